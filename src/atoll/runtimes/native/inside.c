/*
 * How a process comes to be inside an instance of LXC, which makes the surroundings and leaves the process to us; and how one of runc or
 * crun, which is there already, comes under its filter.
 *
 *   atoll-shim lxc PIDFILE PROCESSFILE LOGFILE -- LXC-START ARG... -- /proc/self/fd/4 inside
 *       Starts an instance as an OCI runtime's detached `run` does: LXC-START, in the foreground, makes the instance and runs this
 *       very program (descriptor 4) as its first process. That one sends over descriptor 6 who it is and a socket; LXC's monitor is
 *       then killed, so that the instance's parent is whoever is subreaper here and hears how it ends; and a byte on the socket lets
 *       it become the process of PROCESSFILE (descriptor 5) with this one's output (7 and 8). The socket closes when it has.
 *   atoll-shim enter PIDFILE PROCESSFILE LOGFILE CONSOLE FIRST EXITFILE CGROUP...
 *       Runs the process of PROCESSFILE beside the instance's first process FIRST, in the same namespaces and in the control groups
 *       with these directories. It gets a terminal of the instance's, which is sent to the unix socket CONSOLE, or with "-"
 *       this program's own stdio. Where EXITFILE exists the instance has ended, and the pid is another's.
 *
 * Both write the process's id to PIDFILE and end once it runs; if it cannot, one line of JSON in LOGFILE says why.
 *
 *   atoll-shim filter
 *       Becomes the command of the PROCESSFILE at descriptor 4 under its filter; all else of the process is as the file says already. Who
 *       reads descriptor 5 hears that the filter is on, then why the command cannot be run, or the end of file when it runs.
 *
 * PROCESSFILE: words that end with NUL: the bytes of a system call filter, then that filter (no NUL after it), user, group, further
 * groups with commas, capabilities as a hexadecimal mask, open files soft and hard, rows and columns of the terminal, "1" to make the
 * directory or "0", the directory, the number of arguments, the arguments, the number of variables, the variables.
 */
#define _GNU_SOURCE
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/close_range.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef TIOCGPTPEER
#define TIOCGPTPEER _IO('T', 0x41)
#endif

enum { SELF = 4, PROCESS = 5, PEER = 6, OUTPUT = 7, HANDED_ON = 5, ABOVE = 16, TOLD = 5, GROUPS_MAX = 256, DEAD_LOOKS = 5, LOOK_MS = 100, CAPABILITIES = 64 };

struct program {
    struct sock_fprog filter;
    uid_t uid;
    gid_t gid;
    gid_t groups[GROUPS_MAX];
    size_t group_count;
    uint64_t capabilities;
    struct rlimit files;
    struct winsize size;
    int make_directory;
    char *directory, **argv, **env;
};

/* What is said on a pipe about a process that is to run: its id, or why it does not. */
struct word {
    pid_t pid;
    char error[240];
};

static void tell(int pipe, pid_t pid, const char *what, int number) {
    struct word word = {.pid = pid};
    if (what) snprintf(word.error, sizeof word.error, "%s: %s", what, strerror(number));
    if (write(pipe, &word, sizeof word) < 0) { /* nobody is left to hear it */
    }
}

static void give_up(int pipe, const char *what) {
    tell(pipe, 0, what, errno);
    _exit(FAILED);
}

static int log_failure(const char *path, const char *words) {
    char line[512];
    int length = snprintf(line, sizeof line, "{\"level\":\"error\",\"msg\":\"");
    for (const char *byte = words; *byte && length < (int)sizeof line - 8; byte++)
        line[length++] = *byte < ' ' || *byte == '"' || *byte == '\\' ? '?' : *byte;
    length += snprintf(line + length, sizeof line - length, "\"}\n");
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, line, length) < 0) return FAILED;
    close(fd);
    return 1;
}

static int fail(const char *log, const char *what) {
    char words[256];
    snprintf(words, sizeof words, "%s: %s", what, strerror(errno));
    return log_failure(log, words);
}

static int write_pid(const char *path, pid_t pid) {
    char next[PATH_MAX], text[16];
    snprintf(next, sizeof next, "%s.next", path);
    int length = snprintf(text, sizeof text, "%d", pid);
    int fd = open(next, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0) return -1;
    int written = write(fd, text, length);
    close(fd);
    return written == length ? rename(next, path) : -1;
}

static int read_text(const char *path, char *text, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t got = read(fd, text, size - 1);
    close(fd);
    if (got < 0) return -1;
    text[got] = 0;
    return 0;
}

/* The words of PROCESSFILE, one after the other. */
struct reader {
    char *at, *end;
};

static char *word_of(struct reader *from) {
    char *word = from->at, *stop = word < from->end ? memchr(word, 0, from->end - word) : NULL;
    from->at = stop ? stop + 1 : from->end;
    return stop ? word : NULL;
}

static long number_of(struct reader *from) {
    char *word = word_of(from);
    return word ? atol(word) : -1;
}

static char **list_of(struct reader *from) {
    long count = number_of(from);
    char **list = count < 0 || count > from->end - from->at ? NULL : calloc(count + 1, sizeof *list);
    for (long at = 0; list && at < count; at++)
        if ((list[at] = word_of(from)) == NULL) return NULL;
    return list;
}

/* Reads PROCESSFILE and closes it; what it holds stays allocated until the process is what it describes. */
static int load(int fd, struct program *program) {
    struct stat info;
    if (fd < 0 || fstat(fd, &info) < 0) return -1;
    struct reader from = {.at = malloc(info.st_size + 1)};
    if (from.at == NULL) return -1;
    from.end = from.at;
    for (ssize_t got; from.end - from.at < info.st_size; from.end += got)
        if ((got = pread(fd, from.end, info.st_size - (from.end - from.at), from.end - from.at)) <= 0) return -1;
    close(fd);
    errno = EINVAL;
    long bytes = number_of(&from);
    if (bytes < 0 || bytes > from.end - from.at || bytes % sizeof(struct sock_filter)) return -1;
    program->filter.len = bytes / sizeof(struct sock_filter);
    program->filter.filter = malloc(bytes + 1);
    if (program->filter.filter == NULL) return -1;
    memcpy(program->filter.filter, from.at, bytes);
    from.at += bytes;
    program->uid = number_of(&from);
    program->gid = number_of(&from);
    char *groups = word_of(&from), *capabilities = word_of(&from);
    if (groups == NULL || capabilities == NULL) return -1;
    for (char *group = strtok(groups, ","); group && program->group_count < GROUPS_MAX; group = strtok(NULL, ","))
        program->groups[program->group_count++] = atol(group);
    program->capabilities = strtoull(capabilities, NULL, 16);
    program->files.rlim_cur = number_of(&from);
    program->files.rlim_max = number_of(&from);
    program->size.ws_row = number_of(&from);
    program->size.ws_col = number_of(&from);
    program->make_directory = number_of(&from);
    program->directory = word_of(&from);
    program->argv = list_of(&from);
    program->env = list_of(&from);
    return program->directory && program->argv && program->argv[0] && program->env ? 0 : -1;
}

static void make_directory(const char *path) {
    char part[PATH_MAX];
    for (size_t at = 1; path[0] && at < sizeof part; at++) {
        if (path[at] != '/' && path[at] != 0) continue;
        memcpy(part, path, at);
        part[at] = 0;
        mkdir(part, 0755); /* that it cannot be made is said by the chdir */
        if (path[at] == 0) return;
    }
}

static int limit_capabilities(const struct program *program) {
    for (int at = 0; at < CAPABILITIES; at++)
        if (!(program->capabilities >> at & 1) && prctl(PR_CAPBSET_READ, at) == 1 && prctl(PR_CAPBSET_DROP, at) < 0) return -1;
    return prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
}

static int hold_capabilities(const struct program *program) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{0}};
    if (program->uid == 0)
        for (int half = 0; half < 2; half++)
            data[half].effective = data[half].permitted = (uint32_t)(program->capabilities >> 32 * half);
    return syscall(SYS_capset, &header, data);
}

static void run_program(const struct program *program) {
    const char *name = program->argv[0], *path = "";
    for (char **variable = program->env; *variable; variable++)
        if (strncmp(*variable, "PATH=", 5) == 0) path = *variable + 5;
    if (strchr(name, '/')) {
        execve(name, program->argv, program->env);
        return;
    }
    int number = ENOENT;
    for (const char *end; *path; path = *end ? end + 1 : end) {
        char file[PATH_MAX];
        end = strchrnul(path, ':');
        if (end == path || snprintf(file, sizeof file, "%.*s/%s", (int)(end - path), path, name) >= (int)sizeof file) continue;
        execve(file, program->argv, program->env);
        if (errno != ENOENT && errno != ENOTDIR) number = errno;
        if (number != ENOENT && number != EACCES) break;
    }
    errno = number;
}

/* Sees to it that no descriptor from `first` on, ours or one that was left open to us, is still there in the next program. */
static void keep_from_program(int first) {
    if (syscall(SYS_close_range, first, ~0U, CLOSE_RANGE_CLOEXEC) == 0) return;
    for (long fd = first; fd < sysconf(_SC_OPEN_MAX); fd++) fcntl(fd, F_SETFD, FD_CLOEXEC);
}

/* Becomes the program; what keeps it from that goes to `pipe`, which closes when it has become it. */
static void become(const struct program *program, int pipe) {
    sigset_t none;
    for (int number = 1; number < NSIG; number++) signal(number, SIG_DFL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    keep_from_program(3);
    umask(022);
    if (program->make_directory) make_directory(program->directory);
    if (limit_capabilities(program) < 0) give_up(pipe, "cannot give up capabilities");
    if (setgroups(program->group_count, program->groups) < 0 || setresgid(program->gid, program->gid, program->gid) < 0 ||
        setresuid(program->uid, program->uid, program->uid) < 0)
        give_up(pipe, "cannot become the user");
    if (hold_capabilities(program) < 0) give_up(pipe, "cannot hold capabilities");
    if (chdir(program->directory) < 0) give_up(pipe, "cannot enter the working directory");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_PDEATHSIG, 0) < 0) give_up(pipe, "cannot give up privileges");
    if (program->filter.len && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program->filter) < 0)
        give_up(pipe, "cannot filter system calls");
    run_program(program);
    give_up(pipe, "cannot be executed");
}

static int send_descriptor(int socket, int fd) {
    char byte = '.';
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof fd)];
    } control = {.header = {.cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    struct iovec data = {.iov_base = &byte, .iov_len = 1};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
    return sendmsg(socket, &message, MSG_NOSIGNAL) == 1 ? 0 : -1;
}

/* Returns the socket that the first process sent, and its id as this pid namespace knows it; -1 when nobody sent anything. */
static int receive_first(int socket, pid_t *first) {
    char byte;
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int)) + CMSG_SPACE(sizeof(struct ucred))];
    } control;
    struct iovec data = {.iov_base = &byte, .iov_len = 1};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t got;
    int pipe = -1;
    while ((got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR) {
    }
    if (got <= 0) return -1;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part; part = CMSG_NXTHDR(&message, part)) {
        struct ucred sender;
        if (part->cmsg_level != SOL_SOCKET) continue;
        if (part->cmsg_type == SCM_RIGHTS) memcpy(&pipe, CMSG_DATA(part), sizeof pipe);
        if (part->cmsg_type == SCM_CREDENTIALS) {
            memcpy(&sender, CMSG_DATA(part), sizeof sender);
            *first = sender.pid;
        }
    }
    return pipe;
}

/*
 * Runs LXC's program with descriptors that it hands on, this program's output among them: what LXC itself has to say is none of the
 * instance's. On its PATH it finds no helper to map ids with: as root it needs none, and they would refuse.
 */
static void run_lxc(char **argv, int self, int process, int peer) {
    char *env[] = {"PATH=/", NULL};
    int given[HANDED_ON + 1] = {self, process, peer, 1, 2, open("/dev/null", O_WRONLY | O_CLOEXEC)};
    for (int at = 0; at <= HANDED_ON; at++)
        if ((given[at] = fcntl(given[at], F_DUPFD_CLOEXEC, ABOVE)) < 0) _exit(FAILED);
    for (int at = 0; at < HANDED_ON; at++)
        if (dup2(given[at], SELF + at) < 0) _exit(FAILED);
    if (dup2(given[HANDED_ON], 1) < 0 || dup2(given[HANDED_ON], 2) < 0) _exit(FAILED);
    close(NEWS);
    keep_from_program(SELF + HANDED_ON);
    execve(argv[0], argv, env);
    _exit(127);
}

/* Returns the oldest child of `parent`, if it has ended and `parent` has not asked for its status; else 0. */
static pid_t dead_child(pid_t parent) {
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", parent, parent);
    pid_t child = read_text(path, text, sizeof text) < 0 ? 0 : atol(text);
    if (child <= 0) return 0;
    snprintf(path, sizeof path, "/proc/%d/stat", child);
    char *name_end = read_text(path, text, sizeof text) < 0 ? NULL : strrchr(text, ')');
    return name_end && name_end[1] == ' ' && name_end[2] == 'Z' ? child : 0;
}

/*
 * Waits until `socket` can be read. LXC waits for ever where its child is killed, as it is by a memory limit that is too small: when
 * the same child has been dead for a while, this returns -1.
 */
static int await_first(int socket, pid_t lxc) {
    struct pollfd peer = {.fd = socket, .events = POLLIN};
    pid_t last = 0;
    for (int seen = 0; seen < DEAD_LOOKS; seen++) {
        if (poll(&peer, 1, LOOK_MS) > 0) return 0;
        pid_t dead = dead_child(lxc);
        if (dead == 0 || dead != last) seen = 0;
        last = dead;
    }
    return -1;
}

int start_lxc(char **argv) {
    const char *pid_file = argv[0], *log = argv[2];
    int peers[2], on = 1, self = open("/proc/self/exe", O_RDONLY | O_CLOEXEC), process = open(argv[1], O_RDONLY | O_CLOEXEC);
    if (strcmp(argv[3], "--") != 0) return 2;
    if (self < 0 || process < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, peers) < 0 ||
        setsockopt(peers[0], SOL_SOCKET, SO_PASSCRED, &on, sizeof on) < 0 || prctl(PR_SET_CHILD_SUBREAPER, 1) < 0)
        return fail(log, "cannot prepare the start");
    pid_t lxc = fork(), first = 0;
    if (lxc < 0) return fail(log, "cannot fork");
    if (lxc == 0) run_lxc(argv + 4, self, process, peers[1]);
    close(peers[1]);
    if (await_first(peers[0], lxc) < 0) {
        kill(lxc, SIGKILL);
        waitpid(lxc, NULL, 0);
        return log_failure(log, "it was killed before it ran");
    }
    int peer = receive_first(peers[0], &first);
    if (peer >= 0) kill(lxc, SIGKILL); /* all is made; and it must not be the one that hears of the process's end */
    waitpid(lxc, NULL, 0);
    if (peer < 0 || first <= 0) return log_failure(log, "LXC ended before it ran"); /* and its own log may say why */
    struct word word = {.pid = 0};
    int failed = write_pid(pid_file, first) < 0 || write(peer, "", 1) != 1;
    if (failed)
        fail(log, "cannot note the process down");
    else if ((failed = read(peer, &word, sizeof word) > 0))
        log_failure(log, word.error);
    if (failed) {
        unlink(pid_file);
        kill(first, SIGKILL);
        waitpid(first, NULL, 0);
    }
    return failed;
}

/* Runs as the instance's first process, made by LXC: nothing of the tenant's has run before it. */
int become_first(void) {
    struct program program = {.uid = 0};
    int pair[2];
    char byte;
    if (prctl(PR_SET_PDEATHSIG, 0) < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0 ||
        send_descriptor(PEER, pair[0]) < 0)
        return FAILED;
    close(pair[0]);
    close(PEER);
    close(SELF);
    if (read(pair[1], &byte, 1) != 1) return FAILED; /* nobody waits for this start any more */
    for (int fd = 1; fd < 3; fd++) {
        if (dup2(OUTPUT + fd - 1, fd) < 0) give_up(pair[1], "cannot use the output");
        close(OUTPUT + fd - 1);
    }
    if (load(PROCESS, &program) < 0) give_up(pair[1], "cannot read what to run");
    become(&program, pair[1]);
    return FAILED;
}

/*
 * Runs as an instance's process in all but its filter and its command. Nothing of the tenant's has run in it: it is linked statically and
 * has no variable of his. No process beside it may trace it or look into it: its file cannot be read there, and so it is not dumpable.
 */
int become_filtered(void) {
    struct program program = {.uid = 0};
    keep_from_program(NEWS);
    if (load(WORDS - 1, &program) < 0 || program.filter.len == 0) give_up(TOLD, "cannot read what to run");
    /* Said to the tool, too: but runc 1.1 built with Go 1.19 now and then leaves an exec the soft limit that Go has raised for itself. */
    if (setrlimit(RLIMIT_NOFILE, &program.files) < 0) give_up(TOLD, "cannot set limits");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program.filter) < 0)
        give_up(TOLD, "cannot filter system calls");
    tell(TOLD, 1, NULL, 0);
    run_program(&program);
    int missing = errno == ENOENT && strchr(program.argv[0], '/') == NULL;
    give_up(TOLD, missing ? "executable file not found in $PATH" : "cannot be executed");
    return FAILED;
}

int became_command(int pipe, const char *log) {
    struct word word;
    int filtered = 0;
    while (read(pipe, &word, sizeof word) == sizeof word) {
        word.error[sizeof word.error - 1] = 0;
        if (word.error[0]) {
            log_failure(log, word.error);
            return 0;
        }
        filtered = 1;
    }
    if (!filtered) log_failure(log, "it was killed before it ran: is the memory or process limit too small?");
    return filtered;
}

/* Gives this process a terminal of the instance's, owned by the program's user, and sends its other side away. */
static void take_terminal(int socket, const struct program *program, int pipe) {
    int unlocked = 0, master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master < 0 || ioctl(master, TIOCSPTLCK, &unlocked) < 0 || ioctl(master, TIOCSWINSZ, &program->size) < 0)
        give_up(pipe, "cannot make a terminal");
    int slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave < 0 || fchown(slave, program->uid, -1) < 0) give_up(pipe, "cannot open the terminal");
    if (ioctl(slave, TIOCSCTTY, 0) < 0 || send_descriptor(socket, master) < 0) give_up(pipe, "cannot hand over the terminal");
    for (int fd = 0; fd < 3; fd++)
        if (dup2(slave, fd) < 0) give_up(pipe, "cannot use the terminal");
}

static void join(const char *group, int pipe) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/cgroup.procs", group);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, "0", 1) < 0) give_up(pipe, "cannot join the instance's control group");
    close(fd);
}

static int of_this_user_namespace(pid_t first) {
    char path[64];
    struct stat ours, theirs;
    snprintf(path, sizeof path, "/proc/%d/ns/user", first);
    return stat("/proc/self/ns/user", &ours) == 0 && stat(path, &theirs) == 0 && ours.st_ino == theirs.st_ino;
}

/*
 * Joins the instance and forks the process there. Neither can be traced or looked into from inside before it is the program:
 * they are not dumpable, and hold more than anyone there.
 */
static void go_in(const struct program *program, int first, int same_users, int socket, char **groups, int pipe) {
    const struct rlimit core = {0, 0};
    prctl(PR_SET_DUMPABLE, 0);
    if (setrlimit(RLIMIT_NOFILE, &program->files) < 0 || setrlimit(RLIMIT_CORE, &core) < 0) give_up(pipe, "cannot set limits");
    for (; *groups; groups++) join(*groups, pipe);
    /* The user namespace is the last: as the node's root all the others may be entered, whoever owns them. */
    if (setns(first, CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP) < 0 ||
        (!same_users && setns(first, CLONE_NEWUSER) < 0))
        give_up(pipe, "cannot enter the instance");
    pid_t child = fork();
    if (child < 0) give_up(pipe, "cannot fork in the instance");
    if (child > 0) {
        tell(pipe, child, NULL, 0);
        _exit(0);
    }
    setsid();
    if ((setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0)) give_up(pipe, "cannot become the instance's root");
    if (socket >= 0) take_terminal(socket, program, pipe);
    become(program, pipe);
}

static int connect_to(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || strlen(path) >= sizeof address.sun_path) return -1;
    strcpy(address.sun_path, path);
    return connect(fd, (struct sockaddr *)&address, sizeof address) < 0 ? -1 : fd;
}

int enter_instance(char **argv) {
    const char *pid_file = argv[0], *log = argv[2];
    struct program program = {.uid = 0};
    struct word word;
    char failure[sizeof word.error] = "";
    int pipe[2], socket = -1;
    pid_t first = atol(argv[4]), child = 0;
    if (load(open(argv[1], O_RDONLY | O_CLOEXEC), &program) < 0) return fail(log, "cannot read what to run");
    if (strcmp(argv[3], "-") != 0 && (socket = connect_to(argv[3])) < 0) return fail(log, "cannot reach the agent");
    int handle = syscall(SYS_pidfd_open, first, 0), same_users = of_this_user_namespace(first);
    /* The end is recorded before the pid is free: without a record it is still the instance's. */
    if (handle < 0 || access(argv[5], F_OK) == 0) return log_failure(log, "the instance has ended");
    if (pipe2(pipe, O_CLOEXEC) < 0) return fail(log, "cannot make a pipe");
    pid_t inner = fork();
    if (inner < 0) return fail(log, "cannot fork");
    if (inner == 0) go_in(&program, handle, same_users, socket, argv + 6, pipe[1]);
    close(pipe[1]);
    while (read(pipe[0], &word, sizeof word) == sizeof word) {
        if (word.pid) child = word.pid;
        if (word.error[0]) memcpy(failure, word.error, sizeof failure);
    }
    waitpid(inner, NULL, 0);
    if (failure[0]) return log_failure(log, failure);
    if (child <= 0) return log_failure(log, "it was killed before it ran: is the memory or process limit too small?");
    return write_pid(pid_file, child) < 0 ? fail(log, "cannot note the process down") : 0;
}
