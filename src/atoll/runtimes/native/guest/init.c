/*
 * The first program in every virtual machine: boots it, runs the instance's process, carries its output out, and serves the node.
 *
 *   atoll-guest              as PID 1
 *   atoll-guest serve        without a machine of its own, on a channel that is its stdin (a socket), or its stdin and stdout (two pipes)
 *
 * The second one waits among a container's processes, with their rights and no others, so that commands beside the instance are started
 * by a message (usher.py); it ends with its channel, and what it started ends with it. Tests talk to it, too.
 *
 * One thread, one loop. Nothing that comes over the channel makes it wait or grow: frames, streams, queues are bounded (guest.h), and
 * what a queue has no room for is not read. The guest ends when the instance's process has, after its output was taken.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <linux/vm_sockets.h> /* needs the one above */
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* READ_BYTES: gVisor has all of a buffer that is read into present, however little comes. */
enum { REFRESH_BYTES = 72, POLLS_MAX = 8 + 3 * STREAMS_MAX, RETRY_MS = 200, READ_BYTES = 32 << 10 };

struct stream {
    int used;
    uint16_t id;
    pid_t pid; /* 0 once its end is known */
    int status, told;
    int input, output, error;
    long may_send;           /* bytes of output that the node takes before it gives credit */
    unsigned char *waiting;  /* input that the command has not taken */
    size_t first, last;
    int input_ends;
};

struct log {
    int from, to, port;
    unsigned char bytes[LOG_BYTES];
    size_t first, last;
};

int machineless;

static struct machine machine = {.hostname = "", .hosts = "", .resolv_conf = "", .address = "", .ipv6 = ""};
static struct stream streams[STREAMS_MAX];
static struct log logs[2];
static struct ending ending = {.magic = "atollend", .version = VERSION};
static pid_t first_process;
static int first_told, over;
static long long quiet_since;

static int channel = -1, listener = -1, gone, greeted;
static int outward = -1; /* what is written to, where that is not the channel itself */
static unsigned char input[HEADER_BYTES + FRAME_BYTES_MAX], output[QUEUE_BYTES];
static size_t input_bytes, queue_first, queue_bytes;

static long long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

static uint32_t get4(const unsigned char *at) { return at[0] | at[1] << 8 | at[2] << 16 | (uint32_t)at[3] << 24; }
static uint16_t get2(const unsigned char *at) { return at[0] | at[1] << 8; }

static void put4(unsigned char *at, uint32_t number) {
    for (int byte = 0; byte < 4; byte++) at[byte] = number >> 8 * byte;
}

static size_t room(void) { return QUEUE_BYTES - queue_bytes; }

static void push(const void *bytes, size_t count) {
    for (const unsigned char *at = bytes; count;) {
        size_t place = (queue_first + queue_bytes) % QUEUE_BYTES, part = QUEUE_BYTES - place;
        if (part > count) part = count;
        memcpy(output + place, at, part);
        queue_bytes += part, at += part, count -= part;
    }
}

/* Callers see to the room: data leave QUEUE_RESERVE, and with less than half of that nothing is read that could be answered. */
static void send_frame(enum kind kind, uint16_t stream, const void *bytes, uint32_t count) {
    unsigned char header[HEADER_BYTES] = {[4] = kind, [6] = stream & 255, [7] = stream >> 8};
    if (!greeted || room() < HEADER_BYTES + count) return;
    put4(header, count);
    push(header, sizeof header);
    push(bytes, count);
}

static void send_number(enum kind kind, uint16_t stream, uint32_t number) {
    unsigned char bytes[4];
    put4(bytes, number);
    send_frame(kind, stream, bytes, sizeof bytes);
}

static void shut(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

static struct stream *find(uint16_t id) {
    for (struct stream *stream = streams; stream < streams + STREAMS_MAX; stream++)
        if (stream->used && stream->id == id) return stream;
    return NULL;
}

static void shut_input(struct stream *stream) {
    if (stream->input != stream->output) shut(&stream->input); /* a terminal's side is one for all */
    free(stream->waiting);
    stream->waiting = NULL;
    stream->first = stream->last = 0;
}

static void forget(struct stream *stream) {
    if (stream->pid > 0) kill(stream->pid, SIGKILL);
    shut_input(stream);
    if (stream->error == stream->output) stream->error = -1;
    if (stream->input == stream->output) stream->input = -1;
    shut(&stream->output);
    shut(&stream->error);
    shut(&stream->input);
    stream->used = 0;
}

static void tell_first(void) {
    if (ending.started)
        send_frame(STARTED, 0, NULL, 0);
    else if (over)
        send_frame(FAILED, 0, ending.text, strlen(ending.text));
    if (over && ending.started) send_number(ENDED, 0, ending.status);
}

/* A new session: what the one before had begun ends. */
static void greet(const unsigned char *greeting) {
    unsigned char answer[GREETING_BYTES];
    for (struct stream *stream = streams; stream < streams + STREAMS_MAX; stream++)
        if (stream->used) forget(stream);
    queue_first = queue_bytes = 0;
    memcpy(answer, greeting, sizeof answer);
    put4(answer + MAGIC_BYTES, VERSION);
    push(answer, sizeof answer);
    greeted = 1;
    if (first_told) tell_first();
}

static void lose_channel(void) {
    for (struct stream *stream = streams; stream < streams + STREAMS_MAX; stream++)
        if (stream->used) forget(stream);
    greeted = 0;
    input_bytes = queue_first = queue_bytes = 0;
}

static void execute(uint16_t id, unsigned char *bytes, size_t count, int copies) {
    struct stream *stream = streams;
    struct command command = {.copies = copies, .input = -1, .output = -1, .error = -1};
    while (stream < streams + STREAMS_MAX && stream->used) stream++;
    if (id == 0 || find(id) || stream == streams + STREAMS_MAX || count < 4 || over || (!ending.started && !machineless)) {
        const char *why = over || (!ending.started && !machineless) ? "the instance does not run" : TOO_MANY;
        send_frame(FAILED, id, why, strlen(why));
        return;
    }
    struct words words = {.at = (char *)bytes + 4, .end = (char *)bytes + count};
    if (start_beside(words, get2(bytes), get2(bytes + 2), &command) < 0) {
        send_frame(FAILED, id, command.text, strlen(command.text));
        return;
    }
    *stream = (struct stream){
        .used = 1, .id = id, .pid = command.pid, .may_send = OUTPUT_WINDOW,
        .input = command.input, .output = command.output, .error = command.error,
    };
    fcntl(command.input, F_SETFL, O_NONBLOCK); /* no other flag of theirs can be set */
    if (command.output != command.input) fcntl(command.output, F_SETFL, O_NONBLOCK), fcntl(command.error, F_SETFL, O_NONBLOCK);
    send_frame(STARTED, id, NULL, 0);
}

static void take_input(struct stream *stream, const unsigned char *bytes, size_t count) {
    if (count == 0) {
        stream->input_ends = 1;
        if (stream->first == stream->last) shut_input(stream);
        return;
    }
    if (stream->input < 0 || stream->input_ends) {
        send_number(CREDIT, stream->id, count); /* dropped */
        return;
    }
    if (stream->waiting == NULL && (stream->waiting = malloc(INPUT_WINDOW)) == NULL) return;
    if (stream->first) {
        memmove(stream->waiting, stream->waiting + stream->first, stream->last - stream->first);
        stream->last -= stream->first;
        stream->first = 0;
    }
    if (count > INPUT_WINDOW - stream->last) { /* more than it was told it may send */
        forget(stream);
        return;
    }
    memcpy(stream->waiting + stream->last, bytes, count);
    stream->last += count;
}

static void feed(struct stream *stream) {
    ssize_t taken = write(stream->input, stream->waiting + stream->first, stream->last - stream->first);
    if (taken < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (taken < 0) {
        send_number(CREDIT, stream->id, stream->last - stream->first);
        stream->first = stream->last;
        stream->input_ends = 1;
    } else {
        stream->first += taken;
        send_number(CREDIT, stream->id, taken);
    }
    if (stream->first == stream->last && stream->input_ends) shut_input(stream);
}

static void refresh(const unsigned char *bytes, size_t count) {
    struct {
        struct rand_pool_info info;
        unsigned char bytes[64];
    } pool = {.info = {.entropy_count = 512, .buf_size = 64}};
    static char held[64];
    if (count < REFRESH_BYTES) return;
    if (machineless) {
        send_frame(REFRESHED, 0, NULL, 0);
        return;
    }
    struct words words = {.at = (char *)bytes + REFRESH_BYTES, .end = (char *)bytes + count};
    char *machine_id = next_word(&words), *hostname = next_word(&words), *address = next_word(&words), *mac = next_word(&words);
    char *ipv6 = next_word(&words), *outward = next_word(&words); /* nodes of before say no more than the first */
    memcpy(pool.info.buf, bytes, 64);
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, RNDADDENTROPY, &pool) < 0 || ioctl(fd, RNDRESEEDCRNG) < 0) perror("entropy");
    close(fd);
    uint64_t ns = get4(bytes + 64) | (uint64_t)get4(bytes + 68) << 32;
    const struct timespec now = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    if (clock_settime(CLOCK_REALTIME, &now) < 0) perror("the clock");
    if (hostname && machine_id) rename_host(hostname, machine_id);
    if (mac && mac[0] && set_hardware_address(mac) < 0) perror("the hardware address");
    if (ipv6 && address && address[0]) allow_ipv6(ipv6[0] != 0);
    if (address && address[0] && move_address(machine.address, address) < 0 && set_address(address) < 0) perror("the address");
    if (address && address[0]) snprintf(held, sizeof held, "%s", address), machine.address = held;
    if (ipv6 && set_ipv6(ipv6, outward && outward[0] == '1') < 0) perror("the IPv6 address");
    send_frame(REFRESHED, 0, NULL, 0);
}

static void tell_statistics(void) {
    uint64_t numbers[5];
    unsigned char bytes[sizeof numbers];
    statistics(numbers);
    for (int at = 0; at < 5; at++) put4(bytes + 8 * at, numbers[at]), put4(bytes + 8 * at + 4, numbers[at] >> 32);
    send_frame(STATISTICS, 0, bytes, sizeof bytes);
}

static void obey(enum kind kind, uint16_t id, unsigned char *bytes, size_t count) {
    struct stream *stream = find(id);
    switch (kind) {
    case EXEC:
        execute(id, bytes, count, 0);
        break;
    case COPY:
        execute(id, bytes, count, 1);
        break;
    case STATS:
        tell_statistics();
        break;
    case REFRESH:
        refresh(bytes, count);
        break;
    case SIGNAL: {
        pid_t pid = id == 0 ? (over ? 0 : first_process) : stream ? stream->pid : 0;
        int number = count >= 4 ? (int)get4(bytes) : 0;
        if (pid > 0 && number > 0 && number < NSIG) kill(pid, number);
        break;
    }
    case INPUT:
        if (stream) take_input(stream, bytes, count);
        break;
    case RESIZE:
        if (stream && count >= 4 && stream->input >= 0) {
            const struct winsize size = {.ws_row = get2(bytes), .ws_col = get2(bytes + 2)};
            ioctl(stream->input, TIOCSWINSZ, &size);
        }
        break;
    case CREDIT:
        if (stream && count >= 4) {
            stream->may_send += get4(bytes);
            if (stream->may_send > OUTPUT_WINDOW) stream->may_send = OUTPUT_WINDOW;
        }
        break;
    case CLOSE:
        if (stream) forget(stream);
        break;
    default: /* of a newer node, or the guest's own kinds: nothing */
        break;
    }
}

/* Drops everything up to what may be a greeting. */
static void skip_to_greeting(size_t from) {
    size_t at = from;
    while (at < input_bytes) {
        size_t left = input_bytes - at, compared = left < MAGIC_BYTES ? left : MAGIC_BYTES;
        if (memcmp(input + at, MAGIC, compared) == 0) break;
        at++;
    }
    memmove(input, input + at, input_bytes - at);
    input_bytes -= at;
}

/* Does what the frames say that have come in whole, while there is room for answers. */
static void read_frames(void) {
    size_t at = 0;
    for (;;) {
        size_t left = input_bytes - at;
        if (left >= MAGIC_BYTES && memcmp(input + at, MAGIC, MAGIC_BYTES) == 0) {
            if (left < GREETING_BYTES) break;
            greet(input + at);
            at += GREETING_BYTES;
            continue;
        }
        if (!greeted) {
            skip_to_greeting(at);
            if (input_bytes < MAGIC_BYTES) return;
            at = 0;
            continue;
        }
        if (left < HEADER_BYTES || room() < QUEUE_RESERVE / 2) break;
        uint32_t count = get4(input + at);
        if (count > FRAME_BYTES_MAX || input[at + 5] != 0) { /* no frame */
            if (left < MAGIC_BYTES && memcmp(input + at, MAGIC, left) == 0) break;
            greeted = 0;
            at++;
            continue;
        }
        if (left < HEADER_BYTES + count) break;
        obey(input[at + 4], get2(input + at + 6), input + at + HEADER_BYTES, count);
        at += HEADER_BYTES + count;
    }
    memmove(input, input + at, input_bytes - at);
    input_bytes -= at;
}

static void read_channel(void) {
    size_t left = sizeof input - input_bytes;
    ssize_t got = read(channel, input + input_bytes, left < READ_BYTES ? left : READ_BYTES);
    if (got > 0) {
        input_bytes += got;
        read_frames();
    } else if (got == 0 || (errno != EAGAIN && errno != EINTR))
        gone = 1;
}

static void write_channel(void) {
    size_t part = QUEUE_BYTES - queue_first;
    ssize_t taken = write(outward >= 0 ? outward : channel, output + queue_first, part < queue_bytes ? part : queue_bytes);
    if (taken < 0 && errno != EAGAIN && errno != EINTR) gone = 1;
    if (taken <= 0) return;
    queue_first = (queue_first + taken) % QUEUE_BYTES;
    queue_bytes -= taken;
    if (input_bytes) read_frames();
}

/* Sends on what a command has written. Its end is told once, by an empty frame. */
static void carry(struct stream *stream, int *from, enum kind kind) {
    unsigned char bytes[DATA_BYTES_MAX];
    size_t most = stream->may_send < (long)sizeof bytes ? (size_t)stream->may_send : sizeof bytes;
    ssize_t got = read(*from, bytes, most);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got > 0) {
        stream->may_send -= got;
        send_frame(kind, stream->id, bytes, got);
        return;
    }
    send_frame(kind, stream->id, NULL, 0); /* a terminal's end is EIO */
    if (stream->error == *from && kind == OUTPUT) stream->error = -1;
    if (stream->input == *from) stream->input = -1;
    shut(from);
}

static void end_first(int status) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t numbers[5];
    statistics(numbers);
    ending.status = status;
    ending.killed_for_memory = numbers[4];
    ending.seconds = now.tv_sec, ending.nanoseconds = now.tv_nsec;
    over = 1;
    quiet_since = now_ms();
    if (first_told) send_number(ENDED, 0, status);
}

static void collect(void) {
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        if (pid == first_process) {
            if (ending.started) end_first(status);
            continue;
        }
        for (struct stream *stream = streams; stream < streams + STREAMS_MAX; stream++)
            if (stream->used && stream->pid == pid) stream->pid = 0, stream->status = status;
    }
}

static void tell_ends(void) {
    for (struct stream *stream = streams; stream < streams + STREAMS_MAX; stream++)
        if (stream->used && stream->pid == 0 && !stream->told && room() >= QUEUE_RESERVE / 2) {
            stream->told = 1;
            send_number(ENDED, stream->id, stream->status);
        }
}

/* From the pipe of the instance's process into its log, whoever reads that, or nobody for a while. */
static void pump(struct log *log) {
    if (log->from >= 0 && log->last < LOG_BYTES) {
        ssize_t got = read(log->from, log->bytes + log->last, LOG_BYTES - log->last);
        if (got > 0)
            log->last += got;
        else if (got == 0 || (errno != EAGAIN && errno != EINTR))
            shut(&log->from);
    }
    if (log->to >= 0 && log->first < log->last) {
        ssize_t taken = write(log->to, log->bytes + log->first, log->last - log->first);
        if (taken > 0) {
            log->first += taken;
            quiet_since = now_ms();
        } else if (taken < 0 && errno != EAGAIN && errno != EINTR && machine.vsock)
            shut(&log->to); /* its reader has gone; another may come */
    }
    if (log->first == log->last) log->first = log->last = 0;
}

static void connect_logs(void) {
    for (struct log *log = logs; machine.vsock && log < logs + 2; log++) {
        struct sockaddr_vm node = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = log->port};
        if (log->to >= 0) continue;
        int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd >= 0 && connect(fd, (struct sockaddr *)&node, sizeof node) == 0) {
            fcntl(fd, F_SETFL, O_NONBLOCK);
            log->to = fd;
        } else
            close(fd);
    }
}

/* Whether a port has taken its last bytes can be asked in one way only: whether it takes more. */
static int logs_are_out(void) {
    for (struct log *log = logs; log < logs + 2; log++) {
        struct pollfd port = {.fd = log->to, .events = POLLOUT};
        if (log->from >= 0 || log->first < log->last) return 0;
        if (log->to >= 0 && poll(&port, 1, 0) == 1 && !(port.revents & POLLOUT) && !(port.revents & POLLHUP)) return 0;
        if (log->to >= 0 && port.revents == 0) return 0;
    }
    return 1;
}

static void start(void) {
    struct command command = {.pid = 0};
    make_box(&machine);
    int result = start_first(&machine, &command);
    first_process = command.pid;
    first_told = 1;
    if (result < 0) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        snprintf(ending.text, sizeof ending.text, "%s", command.text);
        ending.status = 127 << 8;
        ending.seconds = now.tv_sec;
        over = 1;
    } else {
        ending.started = 1;
        logs[0].from = command.output;
        logs[1].from = command.error;
        for (int at = 0; at < 2; at++) fcntl(logs[at].from, F_SETFL, O_NONBLOCK);
    }
    tell_first();
}

static void open_channel(void) {
    if (!machine.vsock) {
        channel = open_port("io.atoll.agent");
        logs[0].to = open_port("io.atoll.stdout");
        logs[1].to = open_port("io.atoll.stderr");
        if (channel >= 0) {
            fcntl(channel, F_SETOWN, getpid());
            fcntl(channel, F_SETFL, O_NONBLOCK | O_ASYNC); /* it tells of a node that comes or goes by SIGIO alone */
        }
        return;
    }
    struct sockaddr_vm own = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = VSOCK_AGENT};
    logs[0].to = logs[1].to = -1;
    listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&own, sizeof own) < 0 || listen(listener, 4) < 0) perror("vsock");
}

/* Commands get neither descriptor: 0 to 2 become their own. */
static int open_stdio(void) {
    struct stat info;
    if (fstat(0, &info) < 0 || (channel = fcntl(0, F_DUPFD_CLOEXEC, 3)) < 0) return -1;
    if (!S_ISSOCK(info.st_mode) && (outward = fcntl(1, F_DUPFD_CLOEXEC, 3)) < 0) return -1;
    if (outward >= 0) fcntl(outward, F_SETFL, O_NONBLOCK);
    return fcntl(channel, F_SETFL, O_NONBLOCK);
}

/* The newest connection is the node's: the one before it is of an agent that has gone. */
static void accept_channel(void) {
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) return;
    shut(&channel);
    lose_channel();
    channel = fd;
    gone = 0;
}

static int finished(void) {
    if (!over) return 0;
    if (queue_bytes && !gone && now_ms() - quiet_since < DRAIN_MS_MAX / 60) return 0;
    return logs_are_out() || now_ms() - quiet_since > DRAIN_MS_MAX;
}

static struct pollfd polls[POLLS_MAX];

static struct pollfd *want(struct pollfd *at, int fd, short events) {
    if (fd >= 0 && events) *at++ = (struct pollfd){.fd = fd, .events = events};
    return at;
}

static int ready(const struct pollfd *end, int fd, short events) {
    for (const struct pollfd *at = polls; fd >= 0 && at < end; at++)
        if (at->fd == fd && at->events & events) return at->revents & (events | POLLHUP | POLLERR);
    return 0;
}

static int may_carry(const struct stream *stream) {
    return stream->used && stream->may_send > 0 && room() >= HEADER_BYTES + DATA_BYTES_MAX + QUEUE_RESERVE;
}

static int turn(int signals) {
    struct pollfd *end = want(want(polls, signals, POLLIN), listener, POLLIN);
    int waiting_logs = 0;
    if (!gone) {
        end = want(end, channel, input_bytes < sizeof input && room() >= QUEUE_RESERVE / 2 ? POLLIN : 0);
        end = want(end, outward >= 0 ? outward : channel, queue_bytes ? POLLOUT : 0);
    }
    for (struct log *log = logs; log < logs + 2; log++) {
        end = want(end, log->from, log->last < LOG_BYTES ? POLLIN : 0);
        end = want(end, log->to, log->first < log->last ? POLLOUT : 0);
        waiting_logs |= log->to < 0 && log->first < log->last;
    }
    for (struct stream *stream = streams; stream < streams + STREAMS_MAX; stream++) {
        if (!stream->used) continue;
        end = want(end, stream->input, stream->first < stream->last && room() >= QUEUE_RESERVE / 4 ? POLLOUT : 0);
        if (!may_carry(stream)) continue;
        end = want(end, stream->output, POLLIN);
        if (stream->error != stream->output) end = want(end, stream->error, POLLIN);
    }
    if (poll(polls, end - polls, over || (waiting_logs && machine.vsock) ? RETRY_MS / 10 : -1) < 0 && errno != EINTR) return -1;
    if (ready(end, signals, POLLIN)) {
        struct signalfd_siginfo seen;
        while (read(signals, &seen, sizeof seen) > 0) gone = 0; /* SIGIO: the node may be there again */
        collect();
    }
    if (ready(end, listener, POLLIN)) accept_channel();
    for (struct stream *stream = streams; stream < streams + STREAMS_MAX; stream++) {
        if (stream->used && stream->first < stream->last && ready(end, stream->input, POLLOUT)) feed(stream);
        if (may_carry(stream) && ready(end, stream->output, POLLIN)) carry(stream, &stream->output, OUTPUT);
        if (may_carry(stream) && stream->error != stream->output && ready(end, stream->error, POLLIN))
            carry(stream, &stream->error, ERROR);
    }
    for (struct log *log = logs; log < logs + 2; log++) pump(log);
    if (waiting_logs) connect_logs();
    tell_ends();
    if (!gone && ready(end, channel, POLLIN)) read_channel();
    if (!gone && queue_bytes && channel >= 0) write_channel();
    if (gone) {
        lose_channel();
        if (machine.vsock || machineless) shut(&channel);
    }
    return 0;
}

int main(int argc, char **argv) {
    sigset_t mine;
    machineless = argc == 2 && strcmp(argv[1], "serve") == 0;
    if (!machineless && getpid() != 1) {
        fprintf(stderr, "usage: see init.c\n");
        return 2;
    }
    for (int at = 0; at < 2; at++) logs[at] = (struct log){.from = -1, .to = -1, .port = at ? VSOCK_STDERR : VSOCK_STDOUT};
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0); /* a command shares this memory until it runs: nobody inside looks into it */
    sigemptyset(&mine);
    sigaddset(&mine, SIGCHLD);
    sigaddset(&mine, SIGIO);
    sigprocmask(SIG_BLOCK, &mine, NULL);
    int signals = signalfd(-1, &mine, SFD_CLOEXEC | SFD_NONBLOCK);
    if (machineless) {
        if (open_stdio() < 0) return 2;
        while (!gone && turn(signals) == 0) {
        }
        return 0;
    }
    boot(&machine);
    open_channel();
    start();
    while (!finished() && turn(signals) == 0) {
    }
    write_ending(&ending);
    power_off();
}
