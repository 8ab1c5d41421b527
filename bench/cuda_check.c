/* A CUDA program that checks its own numbers: the driver's library by dlopen, its kernel as PTX, nothing of a toolkit.
 *
 * cuda_check probe                 how many devices there are, and which
 * cuda_check check [N [ROUNDS]]    C = A × B of N × N small whole numbers (exact in 32-bit floats), checked; and its speed
 * cuda_check hold MIB              fill memory, say so, wait for a line on stdin, check the memory, say how it went
 * cuda_check foreign               try to reach every other device by its number
 *
 * Each prints one JSON object per line. `main_ns` is when main began (CLOCK_REALTIME).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

typedef int Result;
typedef int Device;
typedef void *Handle;
typedef uint64_t Pointer;

static struct {
    Result (*init)(unsigned);
    Result (*count)(int *);
    Result (*get)(Device *, int);
    Result (*name)(char *, int, Device);
    Result (*uuid)(unsigned char *, Device);
    Result (*retain)(Handle *, Device);
    Result (*current)(Handle);
    Result (*load)(Handle *, const void *);
    Result (*function)(Handle *, Handle, const char *);
    Result (*alloc)(Pointer *, size_t);
    Result (*release)(Pointer);
    Result (*host_alloc)(void **, size_t);
    Result (*to_device)(Pointer, const void *, size_t);
    Result (*to_host)(void *, Pointer, size_t);
    Result (*fill)(Pointer, unsigned, size_t);
    Result (*launch)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void **, void **);
    Result (*wait)(void);
    Result (*words)(Result, const char **);
} cu;

/* One thread makes one number of C: c[row][col] = sum over k of a[row][k] * b[k][col]. */
static const char PTX[] =
    ".version 7.0\n.target sm_50\n.address_size 64\n"
    ".visible .entry product(.param .u64 A, .param .u64 B, .param .u64 C, .param .u32 N)\n{\n"
    ".reg .pred %p<3>;\n.reg .f32 %f<4>;\n.reg .b32 %r<12>;\n.reg .b64 %d<12>;\n"
    "ld.param.u64 %d1,[A]; ld.param.u64 %d2,[B]; ld.param.u64 %d3,[C]; ld.param.u32 %r1,[N];\n"
    "cvta.to.global.u64 %d1,%d1; cvta.to.global.u64 %d2,%d2; cvta.to.global.u64 %d3,%d3;\n"
    "mov.u32 %r2,%ctaid.x; mov.u32 %r3,%ntid.x; mov.u32 %r4,%tid.x; mad.lo.s32 %r5,%r2,%r3,%r4;\n"
    "mov.u32 %r2,%ctaid.y; mov.u32 %r3,%ntid.y; mov.u32 %r4,%tid.y; mad.lo.s32 %r6,%r2,%r3,%r4;\n"
    "setp.ge.u32 %p1,%r5,%r1; @%p1 ret;\nsetp.ge.u32 %p1,%r6,%r1; @%p1 ret;\n"
    "mul.wide.u32 %d4,%r6,%r1; shl.b64 %d4,%d4,2; add.s64 %d5,%d1,%d4;\n"
    "mul.wide.u32 %d6,%r5,4; add.s64 %d7,%d2,%d6;\n"
    "mul.wide.u32 %d8,%r1,4; mov.f32 %f1,0f00000000; mov.u32 %r7,0;\n"
    "more:\nld.global.f32 %f2,[%d5]; ld.global.f32 %f3,[%d7]; fma.rn.f32 %f1,%f2,%f3,%f1;\n"
    "add.s64 %d5,%d5,4; add.s64 %d7,%d7,%d8; add.u32 %r7,%r7,1; setp.lt.u32 %p2,%r7,%r1; @%p2 bra more;\n"
    "add.s64 %d9,%d3,%d4; add.s64 %d9,%d9,%d6; st.global.f32 [%d9],%f1;\nret;\n}\n";

static void must(Result result, const char *what) {
    if (result == 0) return;
    const char *words = "?";
    if (cu.words) cu.words(result, &words);
    printf("{\"error\": \"%s: %s (%d)\"}\n", what, words, result);
    exit(1);
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void open_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) {
        printf("{\"error\": \"no libcuda.so.1\"}\n");
        exit(1);
    }
    const struct { void *slot; const char *name; } table[] = {
        {&cu.init, "cuInit"}, {&cu.count, "cuDeviceGetCount"}, {&cu.get, "cuDeviceGet"}, {&cu.name, "cuDeviceGetName"},
        {&cu.uuid, "cuDeviceGetUuid_v2"}, {&cu.retain, "cuDevicePrimaryCtxRetain"}, {&cu.current, "cuCtxSetCurrent"},
        {&cu.load, "cuModuleLoadData"}, {&cu.function, "cuModuleGetFunction"}, {&cu.alloc, "cuMemAlloc_v2"},
        {&cu.release, "cuMemFree_v2"}, {&cu.host_alloc, "cuMemAllocHost_v2"}, {&cu.to_device, "cuMemcpyHtoD_v2"},
        {&cu.to_host, "cuMemcpyDtoH_v2"}, {&cu.fill, "cuMemsetD32_v2"}, {&cu.launch, "cuLaunchKernel"},
        {&cu.wait, "cuCtxSynchronize"}, {&cu.words, "cuGetErrorString"},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        *(void **)table[i].slot = dlsym(library, table[i].name);
        if (!*(void **)table[i].slot) {
            printf("{\"error\": \"the driver has no %s\"}\n", table[i].name);
            exit(1);
        }
    }
    must(cu.init(0), "cuInit");
}

static void open_context(void) {
    Device device;
    Handle context;
    must(cu.get(&device, 0), "cuDeviceGet");
    must(cu.retain(&context, device), "cuDevicePrimaryCtxRetain");
    must(cu.current(context), "cuCtxSetCurrent");
}

static void print_uuid(Device device) {
    unsigned char id[16];
    must(cu.uuid(id, device), "cuDeviceGetUuid");
    for (int i = 0; i < 16; i++) printf("%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", id[i]);
}

static int probe(int64_t main_ns) {
    int count = 0;
    must(cu.count(&count), "cuDeviceGetCount");
    printf("{\"main_ns\": %lld, \"devices\": [", (long long)main_ns);
    for (int i = 0; i < count; i++) {
        Device device;
        char name[128] = "";
        must(cu.get(&device, i), "cuDeviceGet");
        must(cu.name(name, sizeof name, device), "cuDeviceGetName");
        printf("%s{\"name\": \"%s\", \"uuid\": \"", i ? ", " : "", name);
        print_uuid(device);
        printf("\"}");
    }
    printf("]}\n");
    return 0;
}

static int check(int64_t main_ns, unsigned n, unsigned rounds) {
    double began = now_s();
    open_context();
    Handle module, kernel;
    must(cu.load(&module, PTX), "cuModuleLoadData");
    must(cu.function(&kernel, module, "product"), "cuModuleGetFunction");
    size_t bytes = (size_t)n * n * sizeof(float);
    float *a, *b, *c;
    must(cu.host_alloc((void **)&a, bytes), "cuMemAllocHost");
    must(cu.host_alloc((void **)&b, bytes), "cuMemAllocHost");
    must(cu.host_alloc((void **)&c, bytes), "cuMemAllocHost");
    for (size_t i = 0; i < (size_t)n * n; i++) {
        a[i] = (float)((i * 2654435761u >> 7) % 13) - 6;
        b[i] = (float)((i * 40503u >> 5) % 11) - 5;
    }
    Pointer da, db, dc;
    must(cu.alloc(&da, bytes), "cuMemAlloc");
    must(cu.alloc(&db, bytes), "cuMemAlloc");
    must(cu.alloc(&dc, bytes), "cuMemAlloc");
    must(cu.to_device(da, a, bytes), "cuMemcpyHtoD");
    must(cu.to_device(db, b, bytes), "cuMemcpyHtoD");
    void *arguments[] = {&da, &db, &dc, &n};
    unsigned blocks = (n + 15) / 16;
    must(cu.launch(kernel, blocks, blocks, 1, 16, 16, 1, 0, NULL, arguments, NULL), "cuLaunchKernel");
    must(cu.wait(), "the kernel");
    double first_s = now_s() - began;
    must(cu.to_host(c, dc, bytes), "cuMemcpyDtoH");
    unsigned wrong = 0, looked = 0;
    for (size_t i = 0; i < (size_t)n * n; i += 977, looked++) {
        size_t row = i / n, column = i % n;
        double sum = 0;
        for (size_t k = 0; k < n; k++) sum += (double)a[row * n + k] * (double)b[k * n + column];
        wrong += (double)c[i] != sum;
    }
    began = now_s();
    for (unsigned i = 0; i < rounds; i++)
        must(cu.launch(kernel, blocks, blocks, 1, 16, 16, 1, 0, NULL, arguments, NULL), "cuLaunchKernel");
    must(cu.wait(), "the kernel");
    double kernel_s = now_s() - began;
    began = now_s();
    for (unsigned i = 0; i < rounds; i++) must(cu.to_device(da, a, bytes), "cuMemcpyHtoD");
    must(cu.wait(), "the copies");
    double copy_s = now_s() - began;
    unsigned tiny = 1, launches = 5000;
    void *small[] = {&da, &db, &dc, &tiny};
    began = now_s();
    for (unsigned i = 0; i < launches; i++) {
        must(cu.launch(kernel, 1, 1, 1, 1, 1, 1, 0, NULL, small, NULL), "cuLaunchKernel");
        must(cu.wait(), "the kernel");
    }
    double launch_s = now_s() - began;
    unsigned pairs = 200;
    began = now_s();
    for (unsigned i = 0; i < pairs; i++) {
        Pointer p;
        must(cu.alloc(&p, 64u << 20), "cuMemAlloc");
        must(cu.release(p), "cuMemFree");
    }
    double alloc_s = now_s() - began;
    printf("{\"main_ns\": %lld, \"n\": %u, \"checked\": %u, \"wrong\": %u, \"first_result_ms\": %.3f, \"gflops\": %.2f, "
           "\"copy_gbps\": %.3f, \"launch_us\": %.3f, \"alloc_us\": %.2f}\n",
           (long long)main_ns, n, looked, wrong, first_s * 1e3, 2.0 * n * n * n * rounds / kernel_s / 1e9,
           (double)bytes * rounds / copy_s / 1e9, launch_s / launches * 1e6, alloc_s / pairs * 1e6);
    return wrong != 0;
}

static int hold(int64_t main_ns, size_t mib) {
    open_context();
    size_t words = mib << 18;
    Pointer memory;
    must(cu.alloc(&memory, words * 4), "cuMemAlloc");
    must(cu.fill(memory, 0x5eed5eedu, words), "cuMemsetD32");
    must(cu.wait(), "the fill");
    printf("{\"main_ns\": %lld, \"ready\": true}\n", (long long)main_ns);
    fflush(stdout);
    char line[64];
    if (!fgets(line, sizeof line, stdin)) return 0;
    double began = now_s();
    uint32_t *back = malloc(1 << 20);
    size_t wrong = 0;
    for (size_t at = 0; at < words; at += words / 16 ? words / 16 : 1) {
        size_t take = words - at < (1 << 18) ? words - at : (1 << 18);
        must(cu.to_host(back, memory + at * 4, take * 4), "cuMemcpyDtoH");
        for (size_t i = 0; i < take; i++) wrong += back[i] != 0x5eed5eedu;
    }
    printf("{\"wrong\": %zu, \"look_ms\": %.3f}\n", wrong, (now_s() - began) * 1e3);
    fflush(stdout);
    return wrong != 0;
}

static int foreign(void) {
    int opened = 0, made = 0;
    char words[512] = "";
    for (int minor = 0; minor < 32; minor++) {
        char path[64];
        snprintf(path, sizeof path, "/dev/nvidia%d", minor);
        int fd = open(path, O_RDWR | O_CLOEXEC);
        int own = fd >= 0;
        if (own) {
            opened++;
            close(fd);
        }
        snprintf(path, sizeof path, "/tmp/try%d", minor);
        if (mknod(path, S_IFCHR | 0666, makedev(195, (unsigned)minor)) == 0) {
            fd = open(path, O_RDWR | O_CLOEXEC);
            if (fd >= 0 && !own) {
                made++;
                snprintf(words + strlen(words), sizeof words - strlen(words), " %d", minor);
            }
            if (fd >= 0) close(fd);
            unlink(path);
        }
    }
    printf("{\"own\": %d, \"foreign\": %d, \"which\": \"%s\"}\n", opened, made, words);
    return made != 0;
}

int main(int count, char **arguments) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    int64_t main_ns = (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    const char *what = count > 1 ? arguments[1] : "";
    unsigned n = count > 2 ? (unsigned)atoi(arguments[2]) : 0;
    if (!strcmp(what, "stamp")) return printf("{\"main_ns\": %lld}\n", (long long)main_ns) < 0;
    if (!strcmp(what, "foreign")) return foreign();
    if (strcmp(what, "probe") && strcmp(what, "check") && strcmp(what, "hold")) {
        fprintf(stderr, "usage: cuda_check stamp|probe|check [N [ROUNDS]]|hold MIB|foreign\n");
        return 2;
    }
    open_driver();
    if (!strcmp(what, "probe")) return probe(main_ns);
    if (!strcmp(what, "hold")) return hold(main_ns, n ? n : 64);
    return check(main_ns, n ? n : 1024, count > 3 ? (unsigned)atoi(arguments[3]) : 20);
}
