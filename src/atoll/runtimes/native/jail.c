/*
 * Becomes a virtual machine monitor in a jail of its own, so that whoever breaks out of a guest into it finds nothing.
 *
 *   atoll-jail OPTION... -- PROGRAM ARG...
 *     -p FILE            where the process's id goes
 *     -l FILE            what it says itself, and why it could not be started: a line of JSON
 *     -r DIRECTORY       an empty one, where the jail's root is put together
 *     -u ID              user and group; nobody else's
 *     -b SOURCE=PLACE    shown read-only at PLACE in the jail, file or directory
 *     -w SOURCE=PLACE    the same, to be written to
 *     -d PLACE=MAJOR,MINOR  a character device that it may open
 *     -g DIRECTORY       a control group to be in
 *     -f BYTES           the size that no file it writes may be larger than
 *     -m BYTES           how much memory it may lock
 *     -t NAME            a tap of the network namespace that this is started in, as descriptor 5
 *     -o FILE=NUMBER     a file, open for reading, as descriptor NUMBER (14 to 19)
 *     -s                 its memory in small pages: of a huge one that it touches once, all would be its own
 *   atoll-jail tsc
 *     Says how fast this processor's time stamp counter runs, in kHz.
 *
 * The jail: mounts, processes, names and IPC of its own; a root that holds what was named and nothing else; no capability, none to be
 * had; the network namespace of the caller. Its stdout and stderr must be FIFOs: 11 and 13 write to them, 10 and 12 keep them
 * open whether somebody reads or not. This program ends once PROGRAM runs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { NEWS = 3, TAP = 5, FIFOS = 10, FIRST_OPENED = 14, FIRST_FREE = 20, ITEMS_MAX = 64, WORDS_MAX = 512, FAILED = 125, CAPABILITIES = 64 };

static struct {
    const char *pid_file, *log, *root, *tap, *groups[ITEMS_MAX];
    uid_t uid;
    rlim_t file_bytes, locked_bytes;
    struct item {
        char kind;
        char *source, *place;
    } items[ITEMS_MAX];
    int group_count, item_count, small_pages;
} jail;

static int report = -1;

static void log_failure(const char *words) {
    char line[WORDS_MAX + 64];
    int length = snprintf(line, sizeof line, "{\"level\":\"error\",\"msg\":\"");
    for (const char *byte = words; *byte && length < (int)sizeof line - 8; byte++)
        line[length++] = *byte < ' ' || *byte == '"' || *byte == '\\' ? '?' : *byte;
    length += snprintf(line + length, sizeof line - length, "\"}\n");
    int fd = open(jail.log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, line, length) < 0) _exit(FAILED);
}

static _Noreturn void die(const char *what) {
    char words[WORDS_MAX];
    int length = snprintf(words, sizeof words, "%s: %s", what, strerror(errno));
    if (length >= WORDS_MAX) length = WORDS_MAX - 1;
    if (report < 0)
        log_failure(words);
    else if (write(report, words, length) < 0)
        _exit(FAILED);
    _exit(1);
}

static void parse(int argc, char **argv) {
    for (int option; (option = getopt(argc, argv, "+p:l:r:u:b:w:d:g:t:f:m:o:s")) != -1;) {
        switch (option) {
        case 'p': jail.pid_file = optarg; break;
        case 'l': jail.log = optarg; break;
        case 'r': jail.root = optarg; break;
        case 'u': jail.uid = strtoul(optarg, NULL, 10); break;
        case 't': jail.tap = optarg; break;
        case 's': jail.small_pages = 1; break;
        case 'f': jail.file_bytes = strtoull(optarg, NULL, 10); break;
        case 'm': jail.locked_bytes = strtoull(optarg, NULL, 10); break;
        case 'g':
            if (jail.group_count < ITEMS_MAX) jail.groups[jail.group_count++] = optarg;
            break;
        case 'b': case 'w': case 'd': case 'o': {
            char *equals = strchr(optarg, '=');
            if (equals == NULL || jail.item_count == ITEMS_MAX) _exit(2);
            *equals = 0;
            jail.items[jail.item_count++] = (struct item){option, optarg, equals + 1};
            break;
        }
        default: _exit(2);
        }
    }
    if (!jail.pid_file || !jail.log || !jail.root || !jail.uid || optind == argc) _exit(2);
}

static void move_to(int fd, int number) {
    if (fd < 0 || (fd == number ? fcntl(fd, F_SETFD, 0) : dup3(fd, number, 0)) < 0) die("descriptors");
}

static void take_descriptors(void) {
    for (int stream = 0; stream < 2; stream++) {
        char path[32];
        snprintf(path, sizeof path, "/proc/self/fd/%d", stream + 1);
        int writing = open(path, O_WRONLY | O_CLOEXEC);
        move_to(stream + 1, FIFOS + 2 * stream);
        move_to(writing, FIFOS + 2 * stream + 1);
        close(writing);
    }
    int log = open(jail.log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600), null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    move_to(log, 1);
    move_to(log, 2);
    move_to(null, 0);
    for (struct item *item = jail.items; item < jail.items + jail.item_count; item++) {
        int number = item->kind == 'o' ? atoi(item->place) : 0;
        if (item->kind != 'o') continue;
        if (number < FIRST_OPENED || number >= FIRST_FREE) _exit(2);
        int file = open(item->source, O_RDONLY | O_CLOEXEC);
        if (file < 0) die(item->source);
        move_to(file, number);
    }
    if (jail.tap == NULL) return;
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    int tap = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", jail.tap);
    if (tap < 0 || ioctl(tap, TUNSETIFF, &request) < 0) die("the tap");
    move_to(tap, TAP);
}

static void join(void) {
    for (int at = 0; at < jail.group_count; at++) {
        char path[PATH_MAX];
        snprintf(path, sizeof path, "%s/cgroup.procs", jail.groups[at]);
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd < 0 || write(fd, "0", 1) < 0) die(path);
        close(fd);
    }
}

/* Makes the directories above a place in the new root, and the place itself: a directory, or a file. */
static void make_place(char *path, int directory) {
    for (char *at = path + strlen(jail.root) + 1; *at; at++)
        if (*at == '/') {
            *at = 0;
            if (mkdir(path, 0755) < 0 && errno != EEXIST) die(path);
            *at = '/';
        }
    if (directory && mkdir(path, 0755) < 0 && errno != EEXIST) die(path);
    if (!directory) close(open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
}

static void furnish(void) {
    if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0) die("private mounts");
    if (mount("jail", jail.root, "tmpfs", MS_NOSUID, "mode=755,size=256k") < 0) die(jail.root);
    for (struct item *item = jail.items; item < jail.items + jail.item_count; item++) {
        if (item->kind == 'o') continue;
        char place[PATH_MAX];
        struct stat info;
        int major_number, minor_number, flags = MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV | (item->kind == 'b' ? MS_RDONLY : MS_NOEXEC);
        snprintf(place, sizeof place, "%s%s", jail.root, item->kind == 'd' ? item->source : item->place);
        if (item->kind == 'd') {
            if (sscanf(item->place, "%d,%d", &major_number, &minor_number) != 2) _exit(2);
            make_place(place, 0);
            unlink(place);
            if (mknod(place, S_IFCHR | 0600, makedev(major_number, minor_number)) < 0 || chown(place, jail.uid, jail.uid) < 0) die(place);
            continue;
        }
        if (stat(item->source, &info) < 0) die(item->source);
        make_place(place, S_ISDIR(info.st_mode));
        if (mount(item->source, place, NULL, MS_BIND, NULL) < 0 || mount(NULL, place, NULL, flags, NULL) < 0) die(item->source);
    }
    if (chdir(jail.root) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0) die("the root");
    if (chdir("/") < 0 || mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID, NULL) < 0) die("the root");
}

static void give_up_all(void) {
    const struct rlimit core = {0, 0};
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2] = {{0}};
    const struct rlimit file = {jail.file_bytes, jail.file_bytes}, locked = {jail.locked_bytes, jail.locked_bytes};
    if (setrlimit(RLIMIT_CORE, &core) < 0 || (jail.file_bytes && setrlimit(RLIMIT_FSIZE, &file) < 0)) die("limits");
    if (jail.locked_bytes && setrlimit(RLIMIT_MEMLOCK, &locked) < 0) die("the memory that it may lock");
    if (jail.small_pages) prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0); /* what cannot be had costs memory, and nothing else */
    signal(SIGXFSZ, SIG_IGN); /* what is beyond it is lost, and nothing else */
    for (int at = 0; at < CAPABILITIES; at++)
        if (prctl(PR_CAPBSET_READ, at) == 1 && prctl(PR_CAPBSET_DROP, at) < 0) die("capabilities");
    if (setgroups(0, NULL) < 0 || setresgid(jail.uid, jail.uid, jail.uid) < 0 || setresuid(jail.uid, jail.uid, jail.uid) < 0) die("the user");
    if (syscall(SYS_capset, &header, none) < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) die("privileges");
}

static void write_pid(pid_t pid) {
    char next[PATH_MAX], text[16];
    snprintf(next, sizeof next, "%s.next", jail.pid_file);
    int length = snprintf(text, sizeof text, "%d", pid), fd = open(next, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, text, length) != length || rename(next, jail.pid_file) < 0) {
        kill(pid, SIGKILL);
        die(jail.pid_file);
    }
}

#ifdef __x86_64__
static int say_tsc(void) {
    struct timespec before, after, pause = {.tv_nsec = 50000000};
    clock_gettime(CLOCK_MONOTONIC_RAW, &before);
    unsigned long long from = __builtin_ia32_rdtsc();
    nanosleep(&pause, NULL);
    clock_gettime(CLOCK_MONOTONIC_RAW, &after);
    unsigned long long ticks = __builtin_ia32_rdtsc() - from;
    long long ns = (after.tv_sec - before.tv_sec) * 1000000000LL + after.tv_nsec - before.tv_nsec;
    return printf("%llu\n", ticks * 1000000 / ns) < 0;
}
#else
static int say_tsc(void) { return 1; }
#endif

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "tsc") == 0) return say_tsc();
    /* A monitor's few threads need no heap each. */
    char *nothing[] = {"PATH=/usr/bin", "HOME=/", "MALLOC_ARENA_MAX=1", NULL}, words[WORDS_MAX];
    int pipe[2];
    parse(argc, argv);
    take_descriptors();
    join();
    if (pipe2(pipe, O_CLOEXEC) < 0) die("a pipe");
    pid_t child = syscall(SYS_clone, CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | SIGCHLD, 0, 0, 0, 0);
    if (child < 0) die("namespaces");
    if (child == 0) {
        report = fcntl(pipe[1], F_DUPFD_CLOEXEC, FIRST_FREE);
        close(NEWS);
        setsid();
        furnish();
        give_up_all();
        for (int fd = FIRST_FREE; fd < 1024; fd++)
            if (fd != report) close(fd);
        execve(argv[optind], argv + optind, nothing);
        die(argv[optind]);
    }
    close(pipe[1]);
    ssize_t got = read(pipe[0], words, sizeof words - 1);
    if (got > 0) {
        words[got] = 0;
        log_failure(words);
        waitpid(child, NULL, 0);
        return 1;
    }
    write_pid(child);
    return 0;
}
