/*
 * What the instance's processes live in, and how they get there: namespaces of their own beside init, the image's root with the
 * instance's disk over it, a control group with its limits. A tenant who breaks out of it is alone with a kernel that is his own
 * anyway: the wall is the virtual machine's.
 *
 * PROCESS: words that end with NUL: user, group, further groups with commas, capabilities as a hexadecimal mask, open files soft and
 * hard, "1" to make the directory or "0", the directory, the number of arguments, the arguments, the number of variables, the
 * variables.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/openat2.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define GROUP "/sys/fs/cgroup/box"

#ifndef TIOCGPTPEER
#define TIOCGPTPEER _IO('T', 0x41)
#endif

enum { SUPPLEMENTARY_MAX = 256, CAPABILITIES = 64, CLONE_TREE = 1, MOVE_EMPTY_PATH = 4 };

struct process {
    uid_t uid;
    gid_t gid;
    gid_t groups[SUPPLEMENTARY_MAX];
    size_t group_count;
    uint64_t capabilities;
    struct rlimit files;
    int make_directory;
    char *directory, **argv, **env;
};

enum { UTS, IPC, MOUNTS, PIDS, NAMESPACES };
static const char *const NAMESPACE_NAMES[NAMESPACES] = {"uts", "ipc", "mnt", "pid"};

static int namespaces[NAMESPACES] = {-1, -1, -1, -1}, name_file = -1, group_file = -1, group_place = -1, terminals = -1;
static int root = -1; /* the instance's, as its first process has it */

static char **next_list(struct words *from) {
    long count = next_number(from);
    char **list = count < 0 || count > from->end - from->at ? NULL : calloc(count + 1, sizeof *list);
    for (long at = 0; list && at < count; at++)
        if ((list[at] = next_word(from)) == NULL) {
            free(list);
            return NULL;
        }
    return list;
}

static void forget(struct process *process) {
    free(process->argv);
    free(process->env);
}

static int parse(struct words from, struct process *process) {
    memset(process, 0, sizeof *process);
    process->uid = next_number(&from);
    process->gid = next_number(&from);
    char *groups = next_word(&from), *capabilities = next_word(&from);
    if (groups == NULL || capabilities == NULL) return -1;
    for (char *at = groups, *end; *at && process->group_count < SUPPLEMENTARY_MAX; at = *end == ',' ? end + 1 : end) {
        process->groups[process->group_count++] = strtoul(at, &end, 10);
        if (end == at) return -1;
    }
    process->capabilities = strtoull(capabilities, NULL, 16);
    process->files.rlim_cur = next_number(&from);
    process->files.rlim_max = next_number(&from);
    process->make_directory = next_number(&from);
    process->directory = next_word(&from);
    process->argv = next_list(&from);
    process->env = next_list(&from);
    if (process->directory && process->argv && process->argv[0] && process->env) return 0;
    forget(process);
    return -1;
}

/* Says on the pipe to init what went wrong, and ends. */
static _Noreturn void give_up(int pipe, const char *what) {
    char text[TEXT_BYTES_MAX];
    int length = snprintf(text, sizeof text, "%s: %s", what, strerror(errno));
    if (length >= (int)sizeof text) length = sizeof text - 1;
    if (write(pipe, text, length) < 0) _exit(126);
    _exit(127);
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

static int limit_capabilities(const struct process *process) {
    for (int at = 0; at < CAPABILITIES; at++)
        if (!(process->capabilities >> at & 1) && prctl(PR_CAPBSET_DROP, at) < 0) {
            if (errno != EINVAL) return -1;
            break; /* the kernel knows no more of them */
        }
    return prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
}

static int hold_capabilities(const struct process *process) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{0}};
    if (process->uid == 0)
        for (int half = 0; half < 2; half++)
            data[half].effective = data[half].permitted = (uint32_t)(process->capabilities >> 32 * half);
    return syscall(SYS_capset, &header, data);
}

static void run(const struct process *process) {
    const char *name = process->argv[0], *path = "";
    for (char **variable = process->env; *variable; variable++)
        if (strncmp(*variable, "PATH=", 5) == 0) path = *variable + 5;
    if (strchr(name, '/')) {
        execve(name, process->argv, process->env);
        return;
    }
    int number = ENOENT;
    for (const char *end; *name && *path; path = *end ? end + 1 : end) {
        char file[PATH_MAX];
        end = strchrnul(path, ':');
        if (end == path || snprintf(file, sizeof file, "%.*s/%s", (int)(end - path), path, name) >= (int)sizeof file) continue;
        /* Asked first: the kernel makes and drops an address space for each file that it cannot execute. */
        if (access(file, X_OK) == 0) execve(file, process->argv, process->env);
        if (errno != ENOENT && errno != ENOTDIR) number = errno;
        if (number != ENOENT && number != EACCES) break;
    }
    errno = number;
}

/* Becomes the process; the pipe closes when it has. */
static _Noreturn void become(const struct process *process, int pipe, int copies) {
    const struct rlimit core = {0, 0};
    sigset_t none;
    signal(SIGPIPE, SIG_DFL); /* all that init ignores, and it has no handlers */
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    umask(022);
    if (!machineless) {
        if (setrlimit(RLIMIT_NOFILE, &process->files) < 0 || setrlimit(RLIMIT_CORE, &core) < 0) give_up(pipe, "cannot set limits");
        if (process->make_directory) make_directory(process->directory);
        if (limit_capabilities(process) < 0) give_up(pipe, "cannot give up capabilities");
        if (setgroups(process->group_count, process->groups) < 0 || setresgid(process->gid, process->gid, process->gid) < 0 ||
            setresuid(process->uid, process->uid, process->uid) < 0)
            give_up(pipe, "cannot become the user");
        if (hold_capabilities(process) < 0) give_up(pipe, "cannot hold capabilities");
    }
    if (chdir(process->directory) < 0) give_up(pipe, "cannot enter the working directory");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) give_up(pipe, "cannot give up privileges");
    if (copies) copy_files(process->argv);
    run(process);
    give_up(pipe, "cannot be executed");
}

/* Waits until the child is what it was to be. Returns 0, or -1 with the reason in `text`. */
static int wait_until_it_runs(int pipe, char *text) {
    size_t length = 0;
    for (ssize_t got; length < TEXT_BYTES_MAX - 1; length += got) {
        while ((got = read(pipe, text + length, TEXT_BYTES_MAX - 1 - length)) < 0 && errno == EINTR) {
        }
        if (got <= 0) break;
    }
    text[length] = 0;
    close(pipe);
    return length ? -1 : 0;
}

/* Three pipes: [0] is the command's side. Returns -1 where there are no descriptors left. */
struct pipes {
    int input[2], output[2], error[2];
};

static void close_both(int pair[2]) {
    close(pair[0]);
    close(pair[1]);
}

static int make_pipes(struct pipes *pipes) {
    int pair[2];
    if (pipe2(pipes->input, O_CLOEXEC) < 0) return -1;
    if (pipe2(pair, O_CLOEXEC) < 0) {
        close_both(pipes->input);
        return -1;
    }
    pipes->output[0] = pair[1], pipes->output[1] = pair[0];
    if (pipe2(pair, O_CLOEXEC) < 0) {
        close_both(pipes->input);
        close_both(pipes->output);
        return -1;
    }
    pipes->error[0] = pair[1], pipes->error[1] = pair[0];
    return 0;
}

static void take_pipes(const struct pipes *pipes, const struct process *process, int pipe) {
    const int given[3] = {pipes->input[0], pipes->output[0], pipes->error[0]};
    for (int fd = 0; fd < 3; fd++) {
        if (!machineless && fchown(given[fd], process->uid, process->gid) < 0) give_up(pipe, "cannot hand over the output");
        if (dup2(given[fd], fd) < 0) give_up(pipe, "cannot use the output");
    }
}

static int to_command(struct command *command, const struct pipes *pipes) {
    close(pipes->input[0]);
    close(pipes->output[0]);
    close(pipes->error[0]);
    command->input = pipes->input[1];
    command->output = pipes->output[1];
    command->error = pipes->error[1];
    return 0;
}

static int sys_open_tree(const char *path) { return syscall(SYS_open_tree, AT_FDCWD, path, CLONE_TREE | O_CLOEXEC); }

static void attach(int tree, const char *path, int pipe) {
    if (tree >= 0 && syscall(SYS_move_mount, tree, "", AT_FDCWD, path, MOVE_EMPTY_PATH) < 0) give_up(pipe, path);
    close(tree);
}

static void node(const char *path, int major, int minor, int pipe) {
    if (mknod(path, S_IFCHR | 0666, makedev(major, minor)) < 0) give_up(pipe, path);
}

static void put_file(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, text, strlen(text)) < 0) perror(path);
    close(fd);
}

/* A file of ours over one of the image's, which is made where it is missing. A link of the image's leads to where it leads inside. */
static void show(int tree, const char *path, int pipe) {
    int fd = open(path, O_WRONLY | O_CREAT | O_NOCTTY | O_NONBLOCK | O_CLOEXEC, 0644);
    if (fd < 0) mkdir("/etc", 0755), fd = open(path, O_WRONLY | O_CREAT | O_NOCTTY | O_NONBLOCK | O_CLOEXEC, 0644);
    if (fd >= 0) close(fd);
    attach(tree, path, pipe);
}

static void hide(void) {
    static const char *const files[] = {"/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/sched_debug", "/proc/timer_list"};
    static const char *const read_only[] = {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"};
    for (size_t at = 0; at < sizeof files / sizeof *files; at++) mount("/dev/null", files[at], NULL, MS_BIND, NULL);
    mount("none", "/sys/firmware", "tmpfs", MS_RDONLY, "size=0");
    for (size_t at = 0; at < sizeof read_only / sizeof *read_only; at++) {
        mount(read_only[at], read_only[at], NULL, MS_BIND, NULL);
        mount(NULL, read_only[at], NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    }
}

/* Runs in the first process, in namespaces of its own: makes the image's root its own, with what every Linux program expects. */
static void furnish(const struct machine *machine, int pipe) {
    const int flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    int pts = sys_open_tree("/pts"), hosts = sys_open_tree("/given/hosts"), name = sys_open_tree("/given/hostname"),
        resolver = sys_open_tree("/given/resolv.conf");
    if (chdir("/root") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
        give_up(pipe, "cannot enter the root");
    mkdir("/proc", 0755), mkdir("/sys", 0755), mkdir("/dev", 0755);
    if (mount("proc", "/proc", "proc", flags, NULL) < 0) give_up(pipe, "/proc");
    if (mount("sysfs", "/sys", "sysfs", flags | MS_RDONLY, NULL) < 0) give_up(pipe, "/sys");
    if (mount("cgroup2", "/sys/fs/cgroup", "cgroup2", flags | MS_RDONLY, NULL) < 0) give_up(pipe, "/sys/fs/cgroup");
    if (mount("tmpfs", "/dev", "tmpfs", MS_NOSUID, "mode=755,size=64k") < 0) give_up(pipe, "/dev");
    umask(0);
    node("/dev/null", 1, 3, pipe), node("/dev/zero", 1, 5, pipe), node("/dev/full", 1, 7, pipe);
    node("/dev/random", 1, 8, pipe), node("/dev/urandom", 1, 9, pipe), node("/dev/tty", 5, 0, pipe);
    umask(022);
    mkdir("/dev/pts", 0755), mkdir("/dev/shm", 01777), mkdir("/dev/mqueue", 01777);
    attach(pts, "/dev/pts", pipe);
    if (mount("shm", "/dev/shm", "tmpfs", flags, "mode=1777,size=64m") < 0) give_up(pipe, "/dev/shm");
    mount("mqueue", "/dev/mqueue", "mqueue", flags, NULL); /* not every kernel has it */
    if (symlink("pts/ptmx", "/dev/ptmx") < 0 || symlink("/proc/self/fd", "/dev/fd") < 0 || symlink("/proc/self/fd/0", "/dev/stdin") < 0 ||
        symlink("/proc/self/fd/1", "/dev/stdout") < 0 || symlink("/proc/self/fd/2", "/dev/stderr") < 0)
        give_up(pipe, "/dev");
    for (const struct volume *volume = machine->volumes; volume < machine->volumes + machine->volume_count; volume++) {
        make_directory(volume->target);
        if (mount(volume->tag, volume->target, "virtiofs", MS_NOSUID | MS_NODEV | (volume->read_only ? MS_RDONLY : 0), NULL) < 0)
            give_up(pipe, volume->target);
    }
    show(hosts, "/etc/hosts", pipe);
    show(name, "/etc/hostname", pipe);
    if (machine->resolv_conf[0]) show(resolver, "/etc/resolv.conf", pipe);
    hide();
    if (machine->read_only_root && mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL) < 0)
        give_up(pipe, "cannot make the root read-only");
}

static void write_number(const char *path, long number) {
    char text[32];
    int length = snprintf(text, sizeof text, "%ld", number), fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, length) < 0) perror(path);
    close(fd);
}

void make_box(const struct machine *machine) {
    char text[HOST_NAME_MAX + 2];
    if (machineless) return;
    mkdir("/given", 0755);
    mkdir("/pts", 0755);
    put_file("/given/hosts", machine->hosts);
    put_file("/given/resolv.conf", machine->resolv_conf);
    snprintf(text, sizeof text, "%s\n", machine->hostname);
    put_file("/given/hostname", text);
    if (mount("devpts", "/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=620,ptmxmode=666,gid=5") < 0) perror("devpts");
    terminals = open("/pts/ptmx", O_PATH | O_CLOEXEC);
    put_file("/sys/fs/cgroup/cgroup.subtree_control", "+memory +pids");
    mkdir(GROUP, 0755);
    write_number(GROUP "/pids.max", machine->pids);
    write_number(GROUP "/memory.max", machine->memory_bytes);
    group_file = open(GROUP "/cgroup.procs", O_WRONLY | O_CLOEXEC);
    group_place = open(GROUP, O_PATH | O_DIRECTORY | O_CLOEXEC);
    name_file = open("/given/hostname", O_WRONLY | O_CLOEXEC);
}

static void join_group(int pipe) {
    if (write(group_file, "0", 1) < 0) give_up(pipe, "cannot join the control group");
}

static int fail(struct command *command, const char *what) {
    snprintf(command->text, sizeof command->text, "%s: %s", what, strerror(errno));
    return -1;
}

int start_first(const struct machine *machine, struct command *command) {
    const long own = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS;
    struct process process;
    struct pipes pipes;
    int words[2];
    errno = EINVAL;
    if (parse(machine->config, &process) < 0) return fail(command, "cannot read what to run");
    if (make_pipes(&pipes) < 0 || pipe2(words, O_CLOEXEC) < 0) return fail(command, "cannot make pipes");
    command->pid = syscall(SYS_clone, own | SIGCHLD, 0, 0, 0, 0);
    if (command->pid < 0) return fail(command, "cannot fork");
    if (command->pid == 0) {
        setsid();
        join_group(words[1]);
        if (unshare(CLONE_NEWCGROUP) < 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
            give_up(words[1], "cannot make namespaces");
        if (sethostname(machine->hostname, strlen(machine->hostname)) < 0) give_up(words[1], "cannot set the host name");
        furnish(machine, words[1]);
        take_pipes(&pipes, &process, words[1]);
        int null = open("/dev/null", O_RDWR | O_CLOEXEC);
        if (null < 0 || dup2(null, 0) < 0) give_up(words[1], "/dev/null");
        become(&process, words[1], 0);
    }
    close(words[1]);
    to_command(command, &pipes);
    close(command->input);
    command->input = -1;
    for (int at = 0; at < NAMESPACES; at++) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/ns/%s", command->pid, NAMESPACE_NAMES[at]);
        namespaces[at] = open(path, O_RDONLY | O_CLOEXEC);
    }
    /* Where init has nothing of its own it goes along, and with it whatever it starts: not one call for each command. */
    for (int at = 0; at < NAMESPACES; at++)
        if (at != MOUNTS && setns(namespaces[at], 0) < 0) perror(NAMESPACE_NAMES[at]);
    forget(&process);
    int result = wait_until_it_runs(words[0], command->text);
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/root", command->pid);
    root = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    return result;
}

static int enter(void) {
    if (unshare(CLONE_NEWCGROUP) < 0) return -1; /* it is in the instance's group already, so this one shows the same */
    return setns(namespaces[MOUNTS], CLONE_NEWNS);
}

/* A kernel that lacks the call (gVisor's) is one in which the name is what this process would find it by anyway. */
static int open_other_side(int terminal) {
    char path[32];
    int number, fd = ioctl(terminal, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (fd >= 0 || !machineless || ioctl(terminal, TIOCGPTN, &number) < 0) return fd;
    snprintf(path, sizeof path, "/dev/pts/%d", number);
    return open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
}

static void take_terminal(int terminal, const struct process *process, int pipe) {
    int other = open_other_side(terminal);
    if (other < 0 || (!machineless && fchown(other, process->uid, -1) < 0)) give_up(pipe, "cannot open the terminal");
    if (ioctl(other, TIOCSCTTY, 0) < 0) give_up(pipe, "cannot take the terminal");
    for (int fd = 0; fd < 3; fd++)
        if (dup2(other, fd) < 0) give_up(pipe, "cannot use the terminal");
}

static int open_terminal(int rows, int columns) {
    const struct winsize size = {.ws_row = rows, .ws_col = columns};
    char path[32] = "/dev/ptmx";
    int unlocked = 0;
    if (!machineless) snprintf(path, sizeof path, "/proc/self/fd/%d", terminals);
    int fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (fd < 0) return -1;
    if (ioctl(fd, TIOCSPTLCK, &unlocked) < 0 || ioctl(fd, TIOCSWINSZ, &size) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static int is_outside; /* a child of an older kernel's, which joins the group itself */

/* An init's end is the machine's; without a machine, what was started must be told. */
static void end_with(pid_t parent) {
    if (machineless && (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != parent)) _exit(127);
}

/* As vfork(2) when it shares our memory: the call must come back in the function of whoever makes it, so it is no function's. */
static inline __attribute__((always_inline)) long clone3_here(struct clone_args *how) {
#ifdef __x86_64__
    long child;
    __asm__ volatile("syscall" : "=a"(child) : "0"(SYS_clone3), "D"(how), "S"(sizeof *how) : "rcx", "r11", "memory");
    return child;
#else
    how->flags &= ~(uint64_t)(CLONE_VM | CLONE_VFORK);
    long child = syscall(SYS_clone3, how, sizeof *how);
    return child < 0 ? -errno : child;
#endif
}

/* Forks into the instance's processes: the parent stays init, which so hears of the end. */
static inline __attribute__((always_inline)) pid_t fork_inside(int copies) {
    /* Begun in the instance's group: moving a process there waits until every processor has passed a quiet point (RCU). */
    struct clone_args how = {.flags = CLONE_INTO_CGROUP, .exit_signal = SIGCHLD, .cgroup = group_place};
    if (!copies) how.flags |= CLONE_VM | CLONE_VFORK;
    long child = clone3_here(&how);
    if (child == 0) return 0;
    if (child < 0) errno = -child;
    if (child == -ENOSYS && (child = fork()) == 0) is_outside = 1;
    return child < 0 ? -1 : child;
}

static _Noreturn __attribute__((noinline)) void go_on(const struct process *process, const struct pipes *pipes, int terminal,
                                                      int pipe, int copies) {
    setsid();
    if (is_outside) join_group(pipe);
    if (!machineless && enter() < 0) give_up(pipe, "cannot enter the instance");
    if (terminal >= 0)
        take_terminal(terminal, process, pipe);
    else
        take_pipes(pipes, process, pipe);
    become(process, pipe, copies);
}

/*
 * A command begins with vfork: another address space costs as much as all the rest, in gVisor and in an emulated machine. The child writes
 * nothing of this process's but what lies below this function's frame, which therefore is one of its own; what copies files goes on beside
 * us, and needs memory of its own.
 */
static __attribute__((noinline)) pid_t begin(const struct process *process, const struct pipes *pipes, int terminal, int pipe,
                                             int copies) {
    const pid_t self = getpid();
    const pid_t child = !machineless ? fork_inside(copies) : copies ? fork() : vfork();
    if (child != 0) return child;
    end_with(self);
    go_on(process, pipes, terminal, pipe, copies);
}

int start_beside(struct words words, int rows, int columns, struct command *command) {
    struct process process;
    struct pipes pipes;
    int said[2], terminal = -1;
    errno = EINVAL;
    if (parse(words, &process) < 0) return fail(command, "cannot read what to run");
    if (rows || columns) {
        if ((terminal = open_terminal(rows, columns)) < 0) goto failed;
    } else if (make_pipes(&pipes) < 0)
        goto failed;
    if (pipe2(said, O_CLOEXEC) < 0) goto failed_later;
    command->pid = begin(&process, &pipes, terminal, said[1], command->copies);
    close(said[1]);
    if (command->pid < 0) {
        close(said[0]);
        goto failed_later;
    }
    forget(&process);
    if (terminal >= 0)
        command->input = command->output = command->error = terminal;
    else
        to_command(command, &pipes);
    if (wait_until_it_runs(said[0], command->text) == 0) return 0;
    close(command->output);
    if (terminal < 0) close(command->input), close(command->error);
    return -1; /* its end is collected as any other's */
failed_later:
    if (terminal >= 0)
        close(terminal);
    else
        close_both(pipes.input), close_both(pipes.output), close_both(pipes.error);
failed:
    forget(&process);
    return fail(command, NO_PROCESS);
}

static uint64_t number_in(const char *path, const char *name) {
    char text[4096], *found = text;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    close(fd);
    if (got < 0) return 0;
    text[got] = 0;
    if (name) found = strstr(text, name);
    return found ? strtoull(found + (name ? strlen(name) : 0), NULL, 10) : 0;
}

void statistics(uint64_t into[5]) {
    memset(into, 0, 5 * sizeof *into);
    if (machineless) return;
    into[0] = number_in(GROUP "/cpu.stat", "usage_usec ");
    into[1] = number_in(GROUP "/memory.current", NULL);
    into[2] = number_in(GROUP "/pids.current", NULL);
    into[3] = disk_bytes_used();
    into[4] = number_in(GROUP "/memory.events", "oom_kill ");
}

/*
 * After a restore: the name by which the instance knows itself. Its files may have been replaced inside; then they stay. All of it from
 * here: a process to do it inside would cost a copy of an emulated machine more than the rest of what is new to it.
 */
void rename_host(const char *hostname, const char *machine_id) {
    char text[HOST_NAME_MAX + 1];
    const size_t length = strlen(hostname);
    if (length && length < sizeof text) {
        if (sethostname(hostname, length) < 0) perror("the hostname");
        memcpy(text, hostname, length), text[length] = '\n';
        if (ftruncate(name_file, 0) < 0 || pwrite(name_file, text, length + 1, 0) < 0) perror("/etc/hostname");
    }
    if (machine_id[0] && root >= 0) {
        const struct open_how how = {.flags = O_WRONLY | O_TRUNC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC,
                                     .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
        struct stat info;
        int fd = syscall(SYS_openat2, root, "etc/machine-id", &how, sizeof how);
        if (fd < 0 && errno == ENOENT) return; /* not every image has one */
        if (fd < 0 || (fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && write(fd, machine_id, strlen(machine_id)) < 0))
            perror("machine-id");
        close(fd);
    }
}
