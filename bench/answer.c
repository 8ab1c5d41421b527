/* The instance behind the proxies that are measured: answers every request of a kept connection with two bytes, one thread, epoll.
   `answer PORT [BODY]`; PORT 0 takes a free one, which it prints. SIGTERM: finishes at once. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CONNECTIONS = 65536, EVENTS = 256 };
static char ends[CONNECTIONS]; /* how much of "\r\n\r\n" each connection has shown */

int main(int argc, char **argv) {
    if (argc < 2) return 2;
    const char *body = argc > 2 ? argv[2] : "ok";
    char answer[512], buffer[65536];
    int length = snprintf(answer, sizeof answer, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\n\r\n%s", strlen(body), body);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGTERM, _exit);
    int yes = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    socklen_t size = sizeof address;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096)) { perror("listen"); return 1; }
    getsockname(listener, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    int poll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, found[EVENTS];
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int count = epoll_wait(poll, found, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            int fd = found[i].data.fd;
            if (fd == listener) {
                int client;
                while ((client = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
                    if (client >= CONNECTIONS) { close(client); continue; }
                    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
                    ends[client] = 0;
                    event.events = EPOLLIN;
                    event.data.fd = client;
                    epoll_ctl(poll, EPOLL_CTL_ADD, client, &event);
                }
                continue;
            }
            ssize_t got = read(fd, buffer, sizeof buffer);
            if (got <= 0) {
                if (got == 0 || (errno != EAGAIN && errno != EINTR)) close(fd);
                continue;
            }
            for (ssize_t at = 0; at < got; at++) {
                ends[fd] = buffer[at] == "\r\n\r\n"[(int)ends[fd]] ? ends[fd] + 1 : buffer[at] == '\r';
                if (ends[fd] == 4) {
                    ends[fd] = 0;
                    if (write(fd, answer, length) != length) { close(fd); break; }
                }
            }
        }
    }
}
