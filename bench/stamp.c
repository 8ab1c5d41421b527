/* The measured process: writes when its first instruction ran (CLOCK_REALTIME, ns) to argv[1], then answers every
 * HTTP request on $PORT with 200. Static, so that what is measured is the start and not the dynamic loader. */
#include <arpa/inet.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static const char ANSWER[] = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";

int main(int argc, char **argv)
{
	struct timespec now;
	char text[32], request[4096];
	clock_gettime(CLOCK_REALTIME, &now);
	int file = argc > 1 ? open(argv[1], O_WRONLY | O_CREAT | O_TRUNC, 0644) : -1;
	if (file >= 0) {
		int length = snprintf(text, sizeof text, "%lld\n", (long long)now.tv_sec * 1000000000LL + now.tv_nsec);
		if (write(file, text, length) != length)
			return 1;
		close(file);
	}
	signal(SIGTERM, _exit);
	signal(SIGPIPE, SIG_IGN);
	const char *port = getenv("PORT");
	if (!port) {
		pause();
		return 0;
	}
	int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 64))
		return 1;
	for (;;) {
		int peer = accept(listener, NULL, NULL);
		if (peer < 0)
			continue;
		if (read(peer, request, sizeof request) > 0 && write(peer, ANSWER, sizeof ANSWER - 1) < 0)
			perror("write");
		close(peer);
	}
}
