/*
 * From the kernel's start to a machine in which the instance can run: modules, disks, root, network; and the way out.
 *
 * One disk holds the image, EROFS or ext4, and is read only. The other is the instance's: a file system, then what the guest is told
 * (words, see config.py), then 4,096 bytes: "atollbox", version (4), bytes of the words (4), where they begin (8); and from byte 2,048 on
 * the guest writes how the instance ended, for a node that may not be listening at that moment. Disks are known by what is in them:
 * each kind of machine orders and names them in its own way.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/random.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    TRAILER_BYTES = 4096,
    ENDING_AT = 2048,
    CONFIG_BYTES_MAX = 4 << 20,
    EROFS_AT = 1024,
    EXT4_AT = 1080,
    EROFS_MAGIC = 0xE0F5E1E2,
    DISKS_WAIT_MS = 5000,
    ENTROPY_BYTES_MAX = 128,
};

struct trailer {
    char magic[8];
    uint32_t version, bytes;
    uint64_t at;
};

static int disk = -1, restarts;
static off_t ending_at;

static _Noreturn void die(const char *what) {
    fprintf(stderr, "atoll-guest: %s: %s\n", what, strerror(errno));
    power_off();
}

/* Those of volumes are loaded where there are any. */
static int is_for_volumes(const char *name) { return strcmp(name, "fuse.ko") == 0 || strcmp(name, "virtiofs.ko") == 0; }

static void load_modules(int for_volumes) {
    char name[128];
    FILE *list = fopen("/modules/order", "re");
    while (list && fgets(name, sizeof name, list)) {
        char path[160];
        name[strcspn(name, "\n")] = 0;
        if (is_for_volumes(name) != for_volumes) continue;
        snprintf(path, sizeof path, "/modules/%s", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)) perror(path);
        close(fd);
    }
    if (list) fclose(list);
}

static int read_at(int fd, void *into, size_t bytes, off_t at) { return pread(fd, into, bytes, at) == (ssize_t)bytes ? 0 : -1; }

/* Whether it is the instance's disk; then its trailer and where that begins. */
static int has_trailer(int fd, struct trailer *trailer, off_t *at) {
    uint64_t bytes;
    if (ioctl(fd, BLKGETSIZE64, &bytes) < 0 || bytes < TRAILER_BYTES) return 0;
    *at = bytes - TRAILER_BYTES;
    return read_at(fd, trailer, sizeof *trailer, *at) == 0 && memcmp(trailer->magic, "atollbox", 8) == 0;
}

static const char *image_kind(int fd) {
    uint32_t erofs = 0;
    uint16_t ext4 = 0;
    if (read_at(fd, &erofs, sizeof erofs, EROFS_AT) == 0 && erofs == EROFS_MAGIC) return "erofs";
    return read_at(fd, &ext4, sizeof ext4, EXT4_AT) == 0 && ext4 == 0xEF53 ? "ext4" : NULL;
}

static void read_config(const struct trailer *trailer, struct machine *machine) {
    if (trailer->bytes > CONFIG_BYTES_MAX || (machine->config.at = malloc(trailer->bytes + 1)) == NULL) die("the configuration");
    if (read_at(disk, machine->config.at, trailer->bytes, trailer->at) < 0) die("the configuration");
    machine->config.end = machine->config.at + trailer->bytes;
}

static int find_disks(struct machine *machine, char *own, char *image, const char **kind) {
    DIR *blocks = opendir("/sys/block");
    own[0] = image[0] = 0;
    for (struct dirent *entry; blocks && (entry = readdir(blocks));) {
        char path[300];
        struct trailer trailer;
        off_t at;
        if (entry->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        int fd = open(path, O_RDWR | O_CLOEXEC);
        if (fd >= 0 && has_trailer(fd, &trailer, &at)) {
            strcpy(own, path);
            disk = fd;
            ending_at = at + ENDING_AT;
            read_config(&trailer, machine);
            continue;
        }
        close(fd);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        const char *found = fd < 0 ? NULL : image_kind(fd);
        close(fd);
        if (found) strcpy(image, path), *kind = found;
    }
    if (blocks) closedir(blocks);
    return own[0] && image[0];
}

static void mount_root(struct machine *machine) {
    char own[300], image[300];
    const char *kind = "";
    for (int waited = 0; !find_disks(machine, own, image, &kind); waited += 10) {
        const struct timespec step = {.tv_nsec = 10000000};
        if (waited >= (int)DISKS_WAIT_MS) die("the disks are not there");
        close(disk);
        nanosleep(&step, NULL);
    }
    mkdir("/image", 0755), mkdir("/own", 0755), mkdir("/root", 0755);
    if (mount(image, "/image", kind, MS_RDONLY | MS_NODEV | MS_NOSUID, NULL) < 0) die("the image");
    if (mount(own, "/own", "ext4", MS_NOATIME | MS_NODEV | MS_NOSUID, "noinit_itable,discard,errors=remount-ro") < 0) die("the disk");
    mkdir("/own/upper", 0755), mkdir("/own/work", 0755);
    if (mount("overlay", "/root", "overlay", MS_NODEV | MS_NOSUID, "lowerdir=/image,upperdir=/own/upper,workdir=/own/work") < 0)
        die("the root");
}

static struct sockaddr_in inet(const char *address) {
    struct sockaddr_in found = {.sin_family = AF_INET};
    inet_pton(AF_INET, address, &found.sin_addr);
    return found;
}

static int bring_up(int socket, const char *name) {
    struct ifreq request = {.ifr_flags = 0};
    strcpy(request.ifr_name, name);
    if (ioctl(socket, SIOCGIFFLAGS, &request) < 0) return -1;
    request.ifr_flags |= IFF_UP;
    return ioctl(socket, SIOCSIFFLAGS, &request);
}

/* The same link as a container's: an address of its own, and one neighbour, known for good, that leads everywhere. */
int set_address(const char *address) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), result = -1;
    struct ifreq request = {.ifr_name = "eth0"};
    struct sockaddr_in given = inet(address), mask = inet("255.255.255.255"), gateway = inet(GATEWAY), all = inet("0.0.0.0");
    struct rtentry near = {.rt_flags = RTF_UP | RTF_HOST, .rt_dev = "eth0"}, far = {.rt_flags = RTF_UP | RTF_GATEWAY, .rt_dev = "eth0"};
    struct arpreq neighbour = {.arp_flags = ATF_PERM | ATF_COM, .arp_dev = "eth0", .arp_ha.sa_family = ARPHRD_ETHER};
    memcpy(neighbour.arp_ha.sa_data, GATEWAY_MAC, 6);
    memcpy(&neighbour.arp_pa, &gateway, sizeof gateway);
    memcpy(&near.rt_dst, &gateway, sizeof gateway), memcpy(&near.rt_genmask, &mask, sizeof mask);
    memcpy(&far.rt_dst, &all, sizeof all), memcpy(&far.rt_genmask, &all, sizeof all), memcpy(&far.rt_gateway, &gateway, sizeof gateway);
    memcpy(&request.ifr_addr, &given, sizeof given);
    if (ioctl(fd, SIOCSIFADDR, &request) < 0) goto done;
    memcpy(&request.ifr_netmask, &mask, sizeof mask);
    if (ioctl(fd, SIOCSIFNETMASK, &request) < 0 || bring_up(fd, "eth0") < 0) goto done;
    if (ioctl(fd, SIOCSARP, &neighbour) < 0) goto done;
    if ((ioctl(fd, SIOCADDRT, &near) < 0 && errno != EEXIST) || (ioctl(fd, SIOCADDRT, &far) < 0 && errno != EEXIST)) goto done;
    result = 0;
done:
    close(fd);
    return result;
}

/* A clone wakes with its origin's. The card takes a new one while it is up. */
int set_hardware_address(const char *mac) {
    struct ifreq request = {.ifr_name = "eth0", .ifr_hwaddr = {.sa_family = ARPHRD_ETHER}};
    char *end = (char *)mac;
    for (int at = 0; at < 6; at++, mac = end + 1) {
        request.ifr_hwaddr.sa_data[at] = strtoul(mac, &end, 16);
        if (end != mac + 2 || *end != (at < 5 ? ':' : 0)) {
            errno = EINVAL;
            return -1;
        }
    }
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), result = ioctl(fd, SIOCSIFHWADDR, &request);
    close(fd);
    return result;
}

void set_kernel(const char *name, const char *value) {
    char path[128];
    snprintf(path, sizeof path, "/proc/sys/%s", name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, value, strlen(value)) < 0) perror(path);
    close(fd);
}

/* What it may use is the control group's to say, and not what the kernel thinks of a program's plans. */
static void make_memory(void) { set_kernel("vm/overcommit_memory", "1"); }

static void make_network(const struct machine *machine, long mtu) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = {.ifr_name = "eth0"};
    set_kernel("net/ipv6/conf/default/disable_ipv6", "1");
    set_kernel("net/ipv4/ip_unprivileged_port_start", "0");
    set_kernel("net/ipv4/ping_group_range", "0 2147483647");
    bring_up(fd, "lo");
    if (machine->address[0]) {
        allow_ipv6(machine->ipv6[0] != 0);
        request.ifr_mtu = mtu;
        if (mtu > 0 && ioctl(fd, SIOCSIFMTU, &request) < 0) perror("mtu");
        if (set_address(machine->address) < 0) perror("the address");
        if (machine->ipv6[0] && set_ipv6(machine->ipv6, machine->outward) < 0) perror("the IPv6 address");
    }
    close(fd);
}

static void stir(const char *hex) {
    struct {
        struct rand_pool_info info;
        unsigned char bytes[ENTROPY_BYTES_MAX];
    } pool = {.info = {0}};
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    for (unsigned byte; pool.info.buf_size < (int)ENTROPY_BYTES_MAX && sscanf(hex, "%2x", &byte) == 1; hex += 2)
        ((unsigned char *)pool.info.buf)[pool.info.buf_size++] = byte;
    pool.info.entropy_count = pool.info.buf_size * 8;
    if (fd >= 0 && pool.info.buf_size && ioctl(fd, RNDADDENTROPY, &pool) < 0) perror("entropy");
    close(fd);
}

static int said_to_kernel(const char *word) {
    char line[4096] = " ";
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, line + 1, sizeof line - 2);
    close(fd);
    line[got > 0 ? got + 1 : 1] = 0;
    return strstr(line, word) != NULL;
}

static void read_volumes(struct machine *machine) {
    machine->volume_count = next_number(&machine->config);
    if (machine->volume_count < 0 || machine->volume_count > VOLUMES_MAX) die("the configuration's volumes");
    for (struct volume *volume = machine->volumes; volume < machine->volumes + machine->volume_count; volume++) {
        volume->tag = next_word(&machine->config);
        volume->target = next_word(&machine->config);
        volume->read_only = next_number(&machine->config);
        if (volume->target == NULL) die("the configuration's volumes");
    }
    if (machine->volume_count) load_modules(1);
}

/*
 * A machine that was kept from running while the kernel measured its only timer has none, and would stand still at the first sleep:
 * it ends at once, and is started again.
 */
static void check_timer(void) {
    static char said[256 << 10];
    int got = klogctl(3 /* SYSLOG_ACTION_READ_ALL */, said, sizeof said - 1);
    if (got <= 0) return;
    said[got] = 0;
    errno = ETIME;
    if (strstr(said, "disabling apic timer")) die("the node kept this machine from running while its timer was measured");
}

void boot(struct machine *machine) {
    mkdir("/proc", 0755), mkdir("/sys", 0755), mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/console", O_RDWR | O_CLOEXEC);
    for (int fd = 0; console >= 0 && fd < 3; fd++) dup2(console, fd);
    restarts = said_to_kernel(" atoll.end=restart");
    machine->vsock = said_to_kernel(" atoll.channel=vsock");
    check_timer();
    load_modules(0);
    if (mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, NULL) < 0) perror("cgroup2");
    mount_root(machine);
    char *version = next_word(&machine->config);
    if (version == NULL || strcmp(version, "atoll-guest-3") != 0) die("the configuration is of another version");
    machine->hostname = next_word(&machine->config);
    machine->hosts = next_word(&machine->config);
    machine->resolv_conf = next_word(&machine->config);
    machine->address = next_word(&machine->config);
    machine->ipv6 = next_word(&machine->config);
    machine->outward = next_number(&machine->config);
    long mtu = next_number(&machine->config);
    machine->read_only_root = next_number(&machine->config);
    machine->pids = next_number(&machine->config);
    machine->memory_bytes = next_number(&machine->config);
    char *entropy = next_word(&machine->config);
    if (entropy == NULL) die("the configuration is cut off");
    read_volumes(machine);
    stir(entropy);
    make_memory();
    make_network(machine, mtu);
}

void write_ending(const struct ending *ending) {
    if (disk < 0) return;
    if (pwrite(disk, ending, sizeof *ending, ending_at) != sizeof *ending) perror("the ending");
    fsync(disk);
}

_Noreturn void power_off(void) {
    if (machineless) _exit(0);
    sync();
    reboot(restarts ? RB_AUTOBOOT : RB_POWER_OFF);
    reboot(RB_AUTOBOOT);
    for (;;) pause();
}

long long disk_bytes_used(void) {
    struct statfs info;
    return statfs("/own", &info) < 0 ? 0 : (long long)(info.f_blocks - info.f_bfree) * info.f_bsize;
}

/* Opens the port of virtio-serial of that name. Returns -1 where there is none. */
int open_port(const char *name) {
    DIR *ports = opendir("/sys/class/virtio-ports");
    int found = -1;
    for (struct dirent *entry; found < 0 && ports && (entry = readdir(ports));) {
        char path[320], text[64] = "";
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t got = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
        close(fd);
        text[got > 0 ? got : 0] = 0;
        text[strcspn(text, "\n")] = 0;
        if (strcmp(text, name) != 0) continue;
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        found = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    }
    if (ports) closedir(ports);
    return found;
}
