/*
 * Copying files out of and into the instance, as one of its own processes: root with its capabilities, in its mounts, so what a
 * name means and what may be written is what the instance itself would find. `vm/files.py` is the other side.
 *
 * A RECORD: type (1: f, d, l, h), 3 bytes of zero, mode (4), user (4), group (4), time of the last change in s (8), size (8), bytes of
 * the name (2), bytes of what it links to (2); then the name, what it links to, and a file's `size` bytes. Names are relative. What goes
 * wrong is said on stderr: errno, a space, the path.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define TEMPORARY ".atoll-copy-"

/* A file that a copy has not given its name yet, and has not written to for LEFTOVER_S, is of one that was killed. */
enum { RECORD_BYTES = 36, PART_BYTES = 64 << 10, DEEPEST = 200, DESCRIPTORS_MAX = 1024, LEFTOVER_S = 300 };

struct entry {
    char type, name[PATH_MAX], link[PATH_MAX];
    mode_t mode;
    uid_t uid;
    gid_t gid;
    long long changed, size;
};

static unsigned char part[PART_BYTES];
static char temporary[sizeof TEMPORARY + 8];
static int made_in = -1; /* the directory where `temporary` is, and is this copy's */

static _Noreturn void give_up(const char *path) {
    int number = errno;
    if (made_in >= 0) unlinkat(made_in, temporary, 0);
    dprintf(2, "%d %s", number, path);
    _exit(1);
}

static void put(unsigned char *at, unsigned long long number, int bytes) {
    for (int byte = 0; byte < bytes; byte++) at[byte] = number >> 8 * byte;
}

static unsigned long long get(const unsigned char *at, int bytes) {
    unsigned long long number = 0;
    for (int byte = 0; byte < bytes; byte++) number |= (unsigned long long)at[byte] << 8 * byte;
    return number;
}

static void write_all(int fd, const void *from, size_t count, const char *path) {
    for (const char *at = from; count;) {
        ssize_t taken = write(fd, at, count);
        if (taken < 0 && errno == EINTR) continue;
        if (taken < 0) give_up(path);
        at += taken, count -= taken;
    }
}

static int read_all(void *into, size_t count) {
    size_t had = 0;
    for (ssize_t got; had < count; had += got) {
        while ((got = read(0, (char *)into + had, count - had)) < 0 && errno == EINTR) {
        }
        if (got <= 0) return had == 0 ? 0 : -1;
    }
    return 1;
}

static void tell(char type, const struct stat *about, const char *name, const char *link) {
    unsigned char record[RECORD_BYTES] = {(unsigned char)type};
    put(record + 4, about->st_mode & 07777, 4), put(record + 8, about->st_uid, 4), put(record + 12, about->st_gid, 4);
    put(record + 16, about->st_mtime < 0 ? 0 : about->st_mtime, 8), put(record + 24, type == 'f' ? about->st_size : 0, 8);
    put(record + 32, strlen(name), 2), put(record + 34, strlen(link), 2);
    write_all(1, record, sizeof record, name);
    write_all(1, name, strlen(name), name);
    write_all(1, link, strlen(link), name);
}

/* A file that changes meanwhile must not break what follows: what it lacks is filled with zeros. */
static void send_file(int fd, const struct stat *about, const char *name) {
    tell('f', about, name, "");
    for (long long left = about->st_size; left > 0;) {
        size_t want = left < (long long)sizeof part ? (size_t)left : sizeof part;
        ssize_t got = read(fd, part, want);
        if (got < 0) give_up(name);
        if (got == 0) memset(part, 0, want), got = want;
        write_all(1, part, got, name);
        left -= got;
    }
}

static void send_below(int fd, const char *name, int depth);

/* `fd` is open for reading, and is closed. */
static void send_open(int fd, const char *name, int depth) {
    struct stat about;
    if (fstat(fd, &about) < 0) give_up(name);
    if (S_ISREG(about.st_mode)) send_file(fd, &about, name);
    if (S_ISDIR(about.st_mode)) {
        tell('d', &about, name, "");
        send_below(fd, name, depth + 1);
        return;
    }
    close(fd);
}

static void send_below(int fd, const char *name, int depth) {
    DIR *directory = fdopendir(fd);
    if (directory == NULL) give_up(name);
    errno = depth > DEEPEST ? ELOOP : 0;
    if (errno) give_up(name);
    for (struct dirent *entry; (entry = readdir(directory));) {
        char path[PATH_MAX], link[PATH_MAX];
        struct stat about;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        errno = ENAMETOOLONG;
        if (snprintf(path, sizeof path, "%s/%s", name, entry->d_name) >= (int)sizeof path) give_up(name);
        if (fstatat(fd, entry->d_name, &about, AT_SYMLINK_NOFOLLOW) < 0) continue; /* removed meanwhile */
        if (S_ISLNK(about.st_mode)) {
            ssize_t length = readlinkat(fd, entry->d_name, link, sizeof link - 1);
            link[length < 0 ? 0 : length] = 0;
            if (length >= 0) tell('l', &about, path, link);
        } else if (S_ISREG(about.st_mode) || S_ISDIR(about.st_mode)) {
            int below = openat(fd, entry->d_name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
            if (below < 0 && errno != ENOENT && errno != ELOOP) give_up(path);
            if (below >= 0) send_open(below, path, depth);
        }
    }
    closedir(directory);
}

static void copy_out(const char *path) {
    struct stat about;
    char top[PATH_MAX];
    snprintf(top, sizeof top, "%s", path);
    for (size_t end = strlen(top); end > 0 && top[end - 1] == '/'; end--) top[end - 1] = 0;
    const char *slash = strrchr(top, '/'), *name = slash ? slash + 1 : top;
    if (stat(path, &about) < 0) give_up(path);
    if (!S_ISREG(about.st_mode) && !S_ISDIR(about.st_mode)) return;
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0) give_up(path);
    send_open(fd, name[0] ? name : ".", 0);
}

/* The directory `path`, made with those above it where it is not there. */
static int open_directory(const char *path) {
    char above[PATH_MAX];
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0 || errno != ENOENT) return fd;
    for (size_t at = 1; at < sizeof above; at++) {
        if (path[at] != '/' && path[at] != 0) continue;
        memcpy(above, path, at);
        above[at] = 0;
        if (mkdir(above, 0755) < 0 && errno != EEXIST) return -1;
        if (path[at] == 0) break;
    }
    return open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

/* Remove what copies that were killed left in the directory `name`, unless that is a link. */
static void remove_leftovers(int parent, const char *name) {
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *directory = fd < 0 ? NULL : fdopendir(fd);
    if (directory == NULL) return;
    for (struct dirent *entry; (entry = readdir(directory));) {
        const char *end = entry->d_name + sizeof TEMPORARY - 1;
        struct stat about;
        if (strncmp(entry->d_name, TEMPORARY, sizeof TEMPORARY - 1) != 0) continue;
        if (strlen(end) != 8 || strspn(end, "0123456789abcdef") != 8) continue;
        if (fstatat(fd, entry->d_name, &about, AT_SYMLINK_NOFOLLOW) < 0) continue;
        if (time(NULL) - about.st_ctime > LEFTOVER_S) unlinkat(fd, entry->d_name, 0);
    }
    closedir(directory);
}

static void make_directory(int parent, const char *name, const struct entry *entry) {
    struct stat about;
    if (mkdirat(parent, name, 0700) < 0) {
        if (errno != EEXIST || fstatat(parent, name, &about, 0) < 0 || !S_ISDIR(about.st_mode)) give_up(entry->name);
        remove_leftovers(parent, name);
        return; /* it keeps its owner and mode */
    }
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 || fchown(fd, entry->uid, entry->gid) < 0 || fchmod(fd, entry->mode) < 0) give_up(entry->name);
    close(fd);
}

static void name_temporary(const struct entry *entry) {
    unsigned number;
    if (getrandom(&number, sizeof number, 0) != sizeof number) give_up(entry->name);
    snprintf(temporary, sizeof temporary, TEMPORARY "%08x", number);
}

static void take_file(int parent, const struct entry *entry) {
    const struct timespec times[2] = {{.tv_sec = entry->changed}, {.tv_sec = entry->changed}};
    int fd = openat(parent, temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0) give_up(entry->name);
    made_in = parent;
    for (long long left = entry->size; left > 0;) {
        size_t want = left < (long long)sizeof part ? (size_t)left : sizeof part;
        errno = EPIPE;
        if (read_all(part, want) != 1) give_up(entry->name);
        write_all(fd, part, want, entry->name);
        left -= want;
    }
    if (fchown(fd, entry->uid, entry->gid) < 0 || fchmod(fd, entry->mode) < 0 || futimens(fd, times) < 0 || close(fd) < 0)
        give_up(entry->name);
}

static int take_entry(struct entry *entry) {
    unsigned char record[RECORD_BYTES];
    int got = read_all(record, sizeof record);
    size_t name = get(record + 32, 2), link = get(record + 34, 2);
    if (got == 0) return 0;
    errno = EINVAL;
    if (got < 0 || name == 0 || name >= sizeof entry->name || link >= sizeof entry->link) give_up("a record");
    if (read_all(entry->name, name) != 1 || (link && read_all(entry->link, link) != 1)) give_up("a record");
    entry->name[name] = entry->link[link] = 0;
    entry->type = record[0];
    entry->mode = get(record + 4, 4) & 07777, entry->uid = get(record + 8, 4), entry->gid = get(record + 12, 4);
    entry->changed = get(record + 16, 8), entry->size = get(record + 24, 8);
    return 1;
}

static void join(char *into, const char *path, const char *name) {
    errno = ENAMETOOLONG;
    if (snprintf(into, PATH_MAX, "%s/%s", path, name) >= PATH_MAX) give_up(name);
}

static void copy_in(const char *path) {
    static struct entry entry;
    int top = open_directory(path[0] ? path : "/");
    if (top < 0) give_up(path);
    remove_leftovers(top, ".");
    close(top);
    while (take_entry(&entry)) {
        char whole[PATH_MAX], other[PATH_MAX];
        join(whole, path, entry.name);
        char *slash = strrchr(whole, '/'), *name = slash + 1;
        *slash = 0;
        int parent = open_directory(whole[0] ? whole : "/");
        if (parent < 0) give_up(whole);
        if (entry.type == 'd') {
            make_directory(parent, name, &entry);
            close(parent);
            continue;
        }
        name_temporary(&entry);
        if (entry.type == 'f') take_file(parent, &entry);
        if (entry.type == 'l') {
            if (symlinkat(entry.link, parent, temporary) < 0) give_up(entry.name);
            made_in = parent;
            if (fchownat(parent, temporary, entry.uid, entry.gid, AT_SYMLINK_NOFOLLOW) < 0) give_up(entry.name);
        }
        if (entry.type == 'h') {
            join(other, path, entry.link);
            if (linkat(AT_FDCWD, other, parent, temporary, 0) < 0) give_up(entry.name);
            made_in = parent;
        }
        if (renameat(parent, temporary, parent, name) < 0) give_up(entry.name);
        unlinkat(parent, temporary, 0); /* it is there where rename(2) did nothing, as both are links to one file */
        made_in = -1;
        close(parent);
    }
}

/* Runs in a process of the instance that becomes no other program. It holds nothing of init's, and nobody inside may look into it. */
_Noreturn void copy_files(char *const *words) {
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    for (int fd = 3; fd < DESCRIPTORS_MAX; fd++) close(fd);
    umask(0);
    if (words[1] == NULL) _exit(2);
    if (strcmp(words[0], "out") == 0)
        copy_out(words[1]);
    else
        copy_in(words[1]);
    _exit(0);
}
