/*
 * What the parts of the guest's init know of each other, and the protocol of its channel.
 *
 * The channel is any stream of bytes to the node: a port of virtio-serial, a connection of vsock, in tests a socket. Numbers are
 * little endian. A session begins with a greeting of the node, MAGIC, version (4 bytes), nonce (8 bytes), which the guest answers with
 * the same and its own version. Whoever reads something that cannot be a frame, or comes new to the channel, skips all up to the
 * next greeting: an agent that was killed may have left half a frame. A new session ends the commands of the one before.
 *
 * A frame: length of what follows the header (4), kind (1), zero (1), stream (2). Stream 0 is the instance's first process.
 */
#ifndef ATOLL_GUEST_H
#define ATOLL_GUEST_H

#include <limits.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#define MAGIC "\x89" "atoll-guest\r\n\x1a\n"

/* Beginnings of a FAILED that say that nothing was run, and that it may be another way (usher.py). */
#define TOO_MANY "too many commands, or one of this number"
#define NO_PROCESS "cannot make a process"

enum {
    VERSION = 1,
    MAGIC_BYTES = 16,
    GREETING_BYTES = MAGIC_BYTES + 12,
    HEADER_BYTES = 8,
    FRAME_BYTES_MAX = 1 << 20, /* a command with its environment; all else is smaller */
    DATA_BYTES_MAX = 16 << 10,
    INPUT_WINDOW = 64 << 10,   /* what the node may send of a command's input before it is told that some was taken */
    OUTPUT_WINDOW = 256 << 10, /* what the guest may send of a command's output, both streams together */
    QUEUE_BYTES = 256 << 10,
    QUEUE_RESERVE = 8 << 10,   /* room that data leave for everything else */
    STREAMS_MAX = 64,
    TEXT_BYTES_MAX = 256,
    LOG_BYTES = 64 << 10,
    DRAIN_MS_MAX = 60000,      /* how long the end of an instance waits for its output to be taken, while nothing moves */
    VSOCK_AGENT = 1024,
    VSOCK_STDOUT = 1025,
    VSOCK_STDERR = 1026,
};

enum kind {
    /* from the node */
    NOTHING = 0,
    EXEC = 1,     /* rows (2), columns (2), both 0 without a terminal; then a PROCESS, see box.c */
    INPUT = 2,    /* nothing: its end */
    RESIZE = 3,   /* rows (2), columns (2) */
    SIGNAL = 4,   /* number (4) */
    CLOSE = 5,    /* kill the command if it runs, and forget the stream */
    STATS = 6,
    CREDIT = 7,   /* bytes (4); in both directions */
    REFRESH = 8,  /* after a restore: entropy (64), time in ns (8), then words: machine id, hostname, address, hardware address,
                     IPv6 address */
    COPY = 9,     /* as EXEC, but the arguments are "out" or "in" and a path, and init does it: see files.c */
    /* from the guest */
    STARTED = 16,
    FAILED = 17,  /* why, in words */
    OUTPUT = 18,  /* nothing: its end */
    ERROR = 19,   /* the same of stderr */
    ENDED = 20,   /* status as of wait(2) (4) */
    STATISTICS = 21, /* 8 bytes each: processor time in us, memory, processes, bytes of disk used, kills for lack of memory */
    REFRESHED = 22,
};

/* How the instance ended, at the end of its disk; see boot.c. */
struct ending {
    char magic[8];
    uint32_t version, started;
    int32_t status;
    uint32_t killed_for_memory;
    int64_t seconds, nanoseconds;
    char text[TEXT_BYTES_MAX]; /* why it did not start */
};

struct words {
    char *at, *end;
};

static inline char *next_word(struct words *from) {
    char *word = from->at, *stop = word < from->end ? memchr(word, 0, from->end - word) : NULL;
    from->at = stop ? stop + 1 : from->end;
    return stop ? word : NULL;
}

static inline long next_number(struct words *from) {
    char *word = next_word(from);
    return word ? atol(word) : -1;
}

enum { VOLUMES_MAX = 16 };

struct volume {
    char *tag, *target;
    int read_only;
};

/* boot.c */
struct machine {
    int vsock;
    struct words config; /* see config.py for its words; what is left in it after boot() is the first process */
    char *hostname, *hosts, *resolv_conf, *address, *ipv6;
    int outward, read_only_root;
    long pids, memory_bytes, volume_count;
    struct volume volumes[VOLUMES_MAX];
};
void boot(struct machine *machine);
void write_ending(const struct ending *ending);
_Noreturn void power_off(void);
int set_address(const char *address);
int set_hardware_address(const char *mac);
void set_kernel(const char *name, const char *value);
long long disk_bytes_used(void);
int open_port(const char *name);

/* ipv6.c */
#define GATEWAY "169.254.1.1"
#define GATEWAY_MAC "\x02\x61\x74\x00\xff\xfe"
void allow_ipv6(int allowed);
int set_ipv6(const char *address, int outward);
int move_address(const char *from, const char *to);

/* box.c */
struct command {
    pid_t pid;
    int copies;               /* it is no program, but files.c */
    int input, output, error; /* this side of its pipes; the terminal is all three */
    char text[TEXT_BYTES_MAX];
};
void make_box(const struct machine *machine);
int start_first(const struct machine *machine, struct command *command);
int start_beside(struct words process, int rows, int columns, struct command *command);
void statistics(uint64_t into[5]);
void rename_host(const char *hostname, const char *machine_id);

/* files.c */
_Noreturn void copy_files(char *const *words);

extern int machineless; /* without a machine of its own: commands run as they are, nothing is mounted */

#endif
