/*
 * The parent of one container, so that the agent may die and come back.
 *
 *   atoll-shim run NETNS STDOUT STDERR PIDFILE EXITFILE LOCKFILE -- TOOL ARG...
 *       Starts TOOL (an OCI runtime's detached `run`) with its output on two FIFOs, learns the container's first process
 *       from PIDFILE, waits for it as its subreaper, and writes EXITFILE ("STATUS SECONDS.NANOSECONDS\n", STATUS as of
 *       wait(2)) by rename. Descriptor 3 carries news to the agent: "pid N\n", or "failed STATUS\n"; end of file after it.
 *       While the shim lives it holds a POSIX lock on LOCKFILE, which names its pid to whoever asks.
 *   atoll-shim exec NETNS PIDFILE [INNERFILE KILL ARG...] -- TOOL ARG...
 *       The same for a command beside the container: its stdio is the caller's, its status goes to descriptor 3
 *       ("exit STATUS\n"), and when descriptor 3's other end closes, the command is killed. Where that process only stands
 *       for the command, TOOL writes the command's own id to INNERFILE ("inner N\n" on descriptor 3), and KILL ends it; an
 *       argument "@" of KILL is that id.
 *   NETNS is the network namespace that TOOL starts in, or "-" for the caller's: a runtime that first enters an instance's
 *   user namespace may not enter a network namespace of the node any more.
 *   atoll-shim filtered LOGFILE run|exec ...
 *       As `run` or `exec` above, with a TOOL that is told to preserve three descriptors, and whose process is `/proc/self/fd/3 filter`:
 *       see inside.c. Descriptor 4 is that program (this one) and 5 what it reads. The process counts as started when it has become
 *       its command under its filter; if it does not, it failed, and one line of JSON in LOGFILE says why.
 *   atoll-shim private [-PATH | +PATH]... -- TOOL ARG...
 *       Becomes TOOL in mounts of its own, in which the mount at each -PATH is gone and an empty directory covers each +PATH.
 *   atoll-shim userns
 *       Makes a user namespace, writes one byte to stdout, and ends with its stdin: the caller writes the id maps.
 *   atoll-shim lxc | enter | inside | filter
 *       See inside.c.
 *
 * It allocates nothing while it waits, and links statically where the system can.
 */
#define _GNU_SOURCE
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* For a process that puts on its filter itself: where it is logged why it did not, and the pipe on which it tells. */
static const char *filter_log;
static int told[2] = {-1, -1};

static void say(const char *word, long number) {
    char line[48];
    int length = snprintf(line, sizeof line, "%s %ld\n", word, number);
    if (write(NEWS, line, length) < 0) { /* the agent is gone: it will ask the lock and the files */
    }
}

static void die(const char *what) {
    fprintf(stderr, "atoll-shim: %s: %s\n", what, strerror(errno));
    say("failed", FAILED << 8);
    _exit(FAILED);
}

static void take_lock(const char *path) {
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (fd < 0 || fcntl(fd, F_SETLK, &lock) < 0) die(path);
    /* The descriptor stays open: closing it would end the lock. */
}

static int open_fifo(const char *path) {
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOCTTY);
    if (fd < 0) die(path);
    return fd;
}

static int enter(const char *netns) {
    int fd = open(netns, O_RDONLY | O_CLOEXEC);
    return fd < 0 ? -1 : setns(fd, CLONE_NEWNET);
}

/* In the tool they are the three from NEWS on, in this order; each place is free when it is taken. */
static int hand_on(void) {
    if (filter_log == NULL) return fcntl(NEWS, F_SETFD, FD_CLOEXEC);
    return dup2(PROGRAM, NEWS) < 0 || dup2(WORDS, PROGRAM) < 0 || dup2(told[1], WORDS) < 0 ? -1 : 0;
}

static pid_t spawn(char **argv, const char *netns, int out, int err) {
    if (filter_log && pipe2(told, O_CLOEXEC) < 0) die("pipe");
    pid_t child = fork();
    if (child < 0) die("fork");
    if (child == 0) {
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        signal(SIGPIPE, SIG_DFL);
        signal(SIGHUP, SIG_DFL);
        signal(SIGINT, SIG_DFL);
        signal(SIGTERM, SIG_DFL);
        if (strcmp(netns, "-") != 0 && enter(netns) < 0) die(netns);
        if (out >= 0) dup2(out, 1);
        if (err >= 0) dup2(err, 2);
        if (hand_on() < 0) _exit(127);
        execv(argv[0], argv);
        _exit(127);
    }
    if (filter_log) {
        close(PROGRAM);
        close(WORDS);
        close(told[1]);
    }
    return child;
}

/*
 * Returns whether the process that the tool started is its command by now. A paused one is not for as long as that lasts: when the other
 * end of `peer` (if it is not -1) closes first, this returns 1, and `reap` sees to the rest.
 */
static int is_command(int peer) {
    struct pollfd ends[] = {{.fd = told[0], .events = POLLIN}, {.fd = peer, .events = 0}};
    if (filter_log == NULL) return 1;
    while (poll(ends, 2, -1) < 0 && errno == EINTR) {
    }
    int runs = ends[0].revents == 0 || became_command(told[0], filter_log);
    close(told[0]);
    return runs;
}

static pid_t read_pid(const char *path) {
    char text[32] = "";
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, text, sizeof text - 1) <= 0) return -1;
    close(fd);
    return (pid_t)atol(text);
}

static void record(const char *path, int status) {
    char next[4096], line[64];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    snprintf(next, sizeof next, "%s.next", path);
    int length = snprintf(line, sizeof line, "%d %lld.%09ld\n", status, (long long)now.tv_sec, now.tv_nsec);
    int fd = open(next, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, line, length) != length || fdatasync(fd) < 0 || rename(next, path) < 0) die(path);
}

/* The container's first process may end before the tool that started it, so the tool alone is waited for. */
static int finish(pid_t tool) {
    int status;
    while (waitpid(tool, &status, 0) < 0)
        if (errno != EINTR) return FAILED << 8;
    return status;
}

static void end(pid_t child) {
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
}

/*
 * End what a tool that failed, or was killed, left behind, and collect it: a process that it had just forked would go on to make control
 * groups that nobody knows of, and PID 1 may be slow to collect. Bounded, since what is frozen cannot end.
 */
static void end_children(void) {
    struct timespec pause = {.tv_nsec = 1000000};
    for (int tries = 0; tries < 1000; tries++) {
        char list[4096] = "", *at = list, *next;
        int fd = open("/proc/thread-self/children", O_RDONLY | O_CLOEXEC);
        if (fd >= 0) {
            if (read(fd, list, sizeof list - 1) < 0) list[0] = '\0';
            close(fd);
        }
        for (long pid; (pid = strtol(at, &next, 10)) > 0; at = next) kill((pid_t)pid, SIGKILL);
        pid_t ended;
        while ((ended = waitpid(-1, NULL, WNOHANG)) > 0) {
        }
        if (ended < 0) return; /* no child is left */
        nanosleep(&pause, NULL);
    }
}

static pid_t fork_exec(char **argv) {
    pid_t child = fork();
    if (child != 0) return child;
    execv(argv[0], argv);
    _exit(127);
}

/*
 * Reap everything until `first` ends, and return its status without reaping it: its pid can go to no stranger before its
 * end is recorded. With `peer` >= 0, kill it when that descriptor's other end closes.
 */
static int reap(pid_t first, int peer, char **killer) {
    sigset_t none;
    sigemptyset(&none);
    for (;;) {
        siginfo_t ended = {.si_pid = 0};
        if (waitid(P_ALL, 0, &ended, WEXITED | WNOWAIT | (peer >= 0 ? WNOHANG : 0)) < 0) {
            if (errno == EINTR) continue;
            return FAILED << 8;
        }
        if (ended.si_pid == first) {
            if (ended.si_code == CLD_EXITED) return ended.si_status << 8;
            return ended.si_status | (ended.si_code == CLD_DUMPED ? 0x80 : 0);
        }
        if (ended.si_pid > 0) {
            waitpid(ended.si_pid, NULL, 0);
            continue;
        }
        struct pollfd other = {.fd = peer, .events = 0};
        if (ppoll(&other, 1, NULL, &none) > 0) {
            if (killer == NULL || fork_exec(killer) < 0) kill(first, SIGKILL);
            peer = -1;
        }
    }
}

static void on_child(int number) { (void)number; }

static void prepare(void) {
    sigset_t child;
    struct sigaction wake = {.sa_handler = on_child};
    setsid();
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    signal(SIGTERM, SIG_IGN);
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, NULL);
    sigaction(SIGCHLD, &wake, NULL);
}

static int run(char **argv) {
    take_lock(argv[5]);
    int out = open_fifo(argv[1]), err = open_fifo(argv[2]);
    pid_t tool = spawn(argv + 7, argv[0], out, err);
    close(out);
    close(err);
    int status = finish(tool);
    pid_t first = status == 0 ? read_pid(argv[3]) : -1;
    if (first > 0 && !is_command(-1)) {
        unlink(argv[3]);
        end(first);
        first = -1;
    }
    if (first <= 0) {
        end_children();
        say("failed", status ? status : FAILED << 8);
        return 1;
    }
    say("pid", first);
    close(NEWS);
    status = reap(first, -1, NULL);
    record(argv[4], status);
    waitpid(first, NULL, 0);
    return 0;
}

/* Puts the id in INNERFILE, which is argv[0], in place of every "@" of the command after it, and says it. */
static char **killer_of(char **argv) {
    static char id[16];
    pid_t inner = read_pid(argv[0]);
    unlink(argv[0]);
    if (inner <= 0) return NULL;
    snprintf(id, sizeof id, "%d", inner);
    for (char **argument = argv + 1; *argument; argument++)
        if (strcmp(*argument, "@") == 0) *argument = id;
    say("inner", inner);
    return argv + 1;
}

static int execute(char **argv) {
    char **separator = argv + 2, **killer = NULL;
    while (*separator && strcmp(*separator, "--") != 0) separator++;
    if (*separator == NULL || separator[1] == NULL) return 2;
    *separator = NULL;
    pid_t tool = spawn(separator + 1, argv[0], -1, -1);
    int status = finish(tool);
    pid_t first = status == 0 ? read_pid(argv[1]) : -1;
    unlink(argv[1]);
    if (first > 0 && !is_command(NEWS)) {
        end(first);
        first = -1;
    }
    if (first <= 0) {
        if (separator > argv + 2) unlink(argv[2]);
        end_children();
        say("failed", status ? status : FAILED << 8);
        return 1;
    }
    say("pid", first);
    if (separator > argv + 2) killer = killer_of(argv + 2);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    dup2(null, 0);
    dup2(null, 1);
    dup2(null, 2); /* or its pipes would outlive the command */
    say("exit", reap(first, NEWS, killer));
    waitpid(first, NULL, 0);
    return 0;
}

/* What fails here is said on stderr only: descriptor 3 is not this program's. */
static int private(char **argv) {
    if (unshare(CLONE_NEWNS) < 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0) {
        perror("atoll-shim: private mounts");
        return FAILED;
    }
    for (; *argv && strcmp(*argv, "--") != 0; argv++) {
        const char *path = *argv + 1;
        if ((**argv == '-' ? umount2(path, MNT_DETACH) : mount("none", path, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL)) < 0) {
            perror(path);
            return FAILED;
        }
    }
    if (*argv == NULL || argv[1] == NULL) return 2;
    execv(argv[1], argv + 1);
    perror(argv[1]);
    return 127;
}

static int userns(void) {
    char byte = '.';
    if (unshare(CLONE_NEWUSER) < 0) return errno;
    if (write(1, &byte, 1) != 1) return FAILED;
    return read(0, &byte, 1) < 0 ? FAILED : 0;
}

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "userns") == 0) return userns();
    if (argc > 3 && strcmp(argv[1], "private") == 0) return private(argv + 2);
    if (argc == 2 && strcmp(argv[1], "inside") == 0) return become_first();
    if (argc == 2 && strcmp(argv[1], "filter") == 0) return become_filtered();
    if (argc > 3 && strcmp(argv[1], "filtered") == 0) {
        filter_log = argv[2];
        argc -= 2;
        argv += 2;
    }
    if (argc > 6 && strcmp(argv[1], "lxc") == 0) return start_lxc(argv + 2);
    if (argc > 8 && strcmp(argv[1], "enter") == 0) return enter_instance(argv + 2);
    if (argc > 9 && strcmp(argv[1], "run") == 0 && strcmp(argv[8], "--") == 0) {
        prepare();
        return run(argv + 2);
    }
    if (argc > 5 && strcmp(argv[1], "exec") == 0) {
        prepare();
        return execute(argv + 2);
    }
    fprintf(stderr, "usage: see shim.c\n");
    return 2;
}
