/*
 * Looks around from inside an instance, and tries what must not work. Says one "name value" a line; what was refused is its errno,
 * what was not is "done". Linked statically, so that it runs in any image.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int written, blocks, strangers;

static void say(const char *name, long result) {
    if (result < 0)
        printf("%s %s\n", name, strerrorname_np(errno) ? strerrorname_np(errno) : "refused");
    else
        printf("%s done\n", name);
}

/* In a child: some end the process that calls them, which is refused as well. */
static void attempt(const char *name, long number, long a, long b, long c, long d, long e) {
    int pipes[2], status;
    long answer[2] = {-1, EPERM};
    if (pipe(pipes) < 0) return;
    pid_t child = fork();
    if (child == 0) {
        alarm(5);
        answer[0] = syscall(number, a, b, c, d, e);
        answer[1] = errno;
        if (write(pipes[1], answer, sizeof answer) < 0) _exit(1);
        _exit(0);
    }
    close(pipes[1]);
    if (read(pipes[0], answer, sizeof answer) != sizeof answer) answer[0] = -1;
    close(pipes[0]);
    waitpid(child, &status, 0);
    errno = answer[1];
    say(name, answer[0]);
}

static void calls(void) {
    const struct timespec now = {1, 0};
    attempt("mount", SYS_mount, (long)"none", (long)"/tmp", (long)"tmpfs", 0, 0);
    attempt("mount-cgroup", SYS_mount, (long)"none", (long)"/tmp", (long)"cgroup", 0, (long)"memory");
    attempt("remount-proc-sys", SYS_mount, 0, (long)"/proc/sys", 0, MS_REMOUNT | MS_BIND, 0);
    attempt("umount", SYS_umount2, (long)"/proc", MNT_DETACH, 0, 0, 0);
    attempt("pivot_root", SYS_pivot_root, (long)"/tmp", (long)"/tmp", 0, 0, 0);
    attempt("open_tree", 428, AT_FDCWD, (long)"/", 1, 0, 0);
    attempt("fsopen", 430, (long)"tmpfs", 0, 0, 0, 0);
    attempt("swapon", SYS_swapon, (long)"/bin/busybox", 0, 0, 0, 0);
    attempt("reboot", SYS_reboot, 0xfee1dead, 672274793, 0, 0, 0); /* that Ctrl-Alt-Del be a signal */
    attempt("init_module", SYS_init_module, (long)"", 0, (long)"", 0, 0);
    attempt("finit_module", SYS_finit_module, 0, (long)"", 0, 0, 0);
    attempt("delete_module", SYS_delete_module, (long)"none", 0, 0, 0, 0);
    attempt("kexec_load", SYS_kexec_load, 0, 0, 0, 0, 0);
    attempt("clock_settime", SYS_clock_settime, CLOCK_REALTIME, (long)&now, 0, 0, 0);
    attempt("acct", SYS_acct, (long)"/tmp/acct", 0, 0, 0, 0);
    attempt("iopl", SYS_iopl, 3, 0, 0, 0, 0);
    attempt("ioperm", SYS_ioperm, 0x70, 1, 1, 0, 0);
    attempt("quotactl", SYS_quotactl, 0x80000100, 0, 0, 0, 0);
    attempt("add_key", SYS_add_key, (long)"user", (long)"probe", (long)"x", 1, -3);
    attempt("keyctl", SYS_keyctl, 0, -3, 1, 0, 0);
    attempt("request_key", SYS_request_key, (long)"user", (long)"probe", 0, 0, 0);
    attempt("bpf", SYS_bpf, 0, 0, 0, 0, 0);
    attempt("perf_event_open", SYS_perf_event_open, 0, 0, -1, -1, 0);
    attempt("userfaultfd", SYS_userfaultfd, 0, 0, 0, 0, 0);
    attempt("io_uring_setup", 425, 1, (long)"", 0, 0, 0);
    attempt("open_by_handle_at", SYS_open_by_handle_at, AT_FDCWD, 0, 0, 0, 0);
    attempt("unshare-user", SYS_unshare, CLONE_NEWUSER, 0, 0, 0, 0);
    attempt("unshare-mount", SYS_unshare, CLONE_NEWNS, 0, 0, 0, 0);
    attempt("unshare-cgroup", SYS_unshare, CLONE_NEWCGROUP, 0, 0, 0, 0);
    attempt("setns", SYS_setns, 0, 0, 0, 0, 0);
    attempt("vsock", SYS_socket, AF_VSOCK, SOCK_STREAM, 0, 0, 0);
    attempt("syslog", SYS_syslog, 3, 0, 0, 0, 0);
    attempt("setpriority", SYS_setpriority, PRIO_PROCESS, 0, -10, 0, 0);
}

/* Every number that a process may have but our own and our parent's: nobody else's may be looked into. */
static void look_into_others(void) {
    pid_t own = getpid(), parent = getppid();
    for (pid_t pid = 1; pid < 70000; pid++) {
        if (pid == own || pid == parent || (kill(pid, 0) < 0 && errno == ESRCH)) continue;
        char path[64], text[4096];
        snprintf(path, sizeof path, "/proc/%d/environ", pid);
        int fd = open(path, O_RDONLY);
        ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text);
        close(fd);
        if (got > 0 && memmem(text, got, "GREETING=hello", 14) == NULL) strangers++;
    }
    printf("strangers %d\n", strangers);
}

static int try_writing(const char *path, const struct stat *about, int kind, struct FTW *at) {
    (void)at;
    if (kind == FTW_F && S_ISREG(about->st_mode)) {
        int fd = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
        if (fd >= 0) {
            if (written++ < 5) printf("writable %s\n", path);
            close(fd);
        }
    }
    return written > 1000;
}

static int look_at_device(const char *path, const struct stat *about, int kind, struct FTW *at) {
    (void)kind, (void)at;
    if (S_ISBLK(about->st_mode)) blocks++;
    if (S_ISCHR(about->st_mode) && strncmp(path, "/dev/pts/", 9) != 0) printf("device %s %u:%u\n", path, major(about->st_rdev), minor(about->st_rdev));
    return 0;
}

static void files(void) {
    static const char *const masked[] = {"/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/interrupts"};
    static const char *const read_only[] = {"/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname",
                                            "/proc/sys/vm/drop_caches", "/proc/irq/default_smp_affinity", "/sys/kernel/uevent_helper",
                                            "/sys/kernel/mm/transparent_hugepage/enabled", "/sys/power/state"};
    char text[4096];
    for (size_t at = 0; at < sizeof masked / sizeof *masked; at++) {
        int fd = open(masked[at], O_RDONLY | O_NONBLOCK);
        printf("masked %s %zd\n", masked[at], fd < 0 ? (ssize_t)0 : read(fd, text, sizeof text));
        close(fd);
    }
    for (size_t at = 0; at < sizeof read_only / sizeof *read_only; at++) {
        int fd = open(read_only[at], O_WRONLY);
        if (fd >= 0) printf("writable %s\n", read_only[at]);
        close(fd);
    }
    nftw("/sys/fs/cgroup", try_writing, 16, FTW_PHYS);
    printf("control-group-files-written %d\n", written);
    written = 0;
    nftw("/proc/sys", try_writing, 16, FTW_PHYS);
    printf("proc-sys-files-written %d\n", written);
    nftw("/dev", look_at_device, 16, FTW_PHYS);
    printf("block-devices %d\n", blocks);
    say("mknod-disk", mknod("/tmp/disk", S_IFBLK | 0600, makedev(254, 0)) == 0 ? open("/tmp/disk", O_RDONLY) : -1);
    say("mknod-memory", mknod("/tmp/memory", S_IFCHR | 0600, makedev(1, 1)) == 0 ? open("/tmp/memory", O_RDONLY) : -1);
}

static void process(void) {
    static const char *const namespaces[] = {"pid", "ipc", "uts", "mnt", "net", "user", "cgroup"};
    char text[4096], path[64];
    struct utsname name;
    struct rlimit limit;
    gid_t groups[32];
    for (size_t at = 0; at < sizeof namespaces / sizeof *namespaces; at++) {
        snprintf(path, sizeof path, "/proc/self/ns/%s", namespaces[at]);
        ssize_t length = readlink(path, text, sizeof text - 1);
        text[length < 0 ? 0 : length] = 0;
        printf("namespace-%s %s\n", namespaces[at], text);
    }
    uname(&name);
    mode_t mask = umask(0);
    getrlimit(RLIMIT_CORE, &limit);
    printf("hostname %s\numask %o\ncore %lu\n", name.nodename, mask, (unsigned long)limit.rlim_max);
    getrlimit(RLIMIT_NOFILE, &limit);
    printf("files-soft %lu\nfiles-hard %lu\n", (unsigned long)limit.rlim_cur, (unsigned long)limit.rlim_max);
    printf("uid %d\ngid %d\nno-new-privileges %d\n", getuid(), getgid(), prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
    int count = getgroups(32, groups);
    for (int at = 0; at < count; at++) printf("group %d\n", groups[at]);
    FILE *mounts = fopen("/proc/self/mounts", "r");
    for (char place[256], kind[64], options[512]; mounts && fscanf(mounts, "%*s %255s %63s %511s %*d %*d", place, kind, options) == 3;)
        printf("mount-at %s %s %s\n", place, kind, options);
    for (int fd = 3; fd < 256; fd++)
        if (fcntl(fd, F_GETFD) >= 0 && (!mounts || fd != fileno(mounts))) printf("descriptor %d\n", fd);
    if (getcwd(text, sizeof text)) printf("directory %s\n", text);
}

int main(void) {
    if (getenv("ATOLL_INSTANCE") == NULL) {
        fputs("this harms a machine that it is run on outside of an instance\n", stderr);
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    process();
    files();
    calls();
    look_into_others();
    puts("end");
    return 0;
}
