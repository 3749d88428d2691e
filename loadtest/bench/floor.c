/*
 * The floor: the least a server can do to serve event streams on Linux.
 *
 * One thread, one epoll, one array of descriptors. Each published event is framed
 * once, and the same bytes go to every stream by send(). It has no topics, no
 * history, no limits and no slow clients: a stream that cannot take all bytes at
 * once is dropped. What another server costs above this is its own doing.
 *
 *   floor PORT [HEARTBEAT_SECONDS]
 *
 *   GET /events     a stream
 *   POST /publish   one event for each line of the body; a burst is one write
 *   GET /healthz    204
 *
 * The process ends with its parent.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define BATCH 512
#define ROOM (1 << 20)
#define MAX_DESCRIPTORS (1 << 20)

static const char head[] =
    "HTTP/1.1 200 \r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    "cache-control: no-store\r\nx-accel-buffering: no\r\nconnection: close\r\n"
    "transfer-encoding: chunked\r\n\r\n8\r\n: open\n\n\r\n";
static const char heartbeat[] = "3\r\n:\n\n\r\n";

/* Place of each descriptor in the array of streams, -1 when it is no stream. */
static int place[MAX_DESCRIPTORS];
static int *streams, stream_count, stream_room;
static int poller;
static unsigned long long published;

static void drop(int fd)
{
    if (place[fd] >= 0) {
        int last = streams[--stream_count];
        streams[place[fd]] = last;
        place[last] = place[fd];
        place[fd] = -1;
    }
    close(fd);
}

static void write_all(const char *block, size_t size)
{
    for (int i = stream_count - 1; i >= 0; i--)
        if (send(streams[i], block, size, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)size)
            drop(streams[i]);
}

static void publish(char *body, size_t size)
{
    static char block[ROOM + 64];
    char *end = body + size;
    size_t used = 32;
    while (body < end) {
        char *newline = memchr(body, '\n', (size_t)(end - body));
        int length = (int)((newline ? newline : end) - body);
        int n = snprintf(block + used, ROOM - used, "id: f1000000:%013llu-0\ndata: %.*s\n\n",
                         1763712000000ULL + ++published, length, body);
        if (n < 0 || (size_t)n >= ROOM - used) return;
        used += (size_t)n;
        body += length + 1;
    }
    char size_line[32];
    int n = snprintf(size_line, sizeof size_line, "%zx\r\n", used - 32);
    memcpy(block + 32 - n, size_line, (size_t)n);
    memcpy(block + used, "\r\n", 2);
    write_all(block + 32 - n, used + 2 - 32 + (size_t)n);
}

/* A request is expected in one read, but for the body of a long burst. */
static void serve(int fd)
{
    static char text[ROOM];
    ssize_t n = recv(fd, text, sizeof text - 1, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) { drop(fd); return; }
    text[n] = 0;
    if (!strncmp(text, "GET /events", 11)) {
        if (send(fd, head, sizeof head - 1, MSG_NOSIGNAL) != sizeof head - 1) { drop(fd); return; }
        if (stream_count == stream_room) {
            stream_room = stream_room ? 2 * stream_room : 1024;
            streams = realloc(streams, (size_t)stream_room * sizeof *streams);
            if (!streams) exit(2);
        }
        place[fd] = stream_count;
        streams[stream_count++] = fd;
    } else if (!strncmp(text, "POST /publish", 13)) {
        char *body = strstr(text, "\r\n\r\n"), *length = strcasestr(text, "\r\ncontent-length:");
        if (!body || !length) { drop(fd); return; }
        body += 4;
        size_t want = strtoul(length + 17, NULL, 10), have = (size_t)(text + n - body);
        while (have < want && want < ROOM / 2) {
            n = recv(fd, body + have, want - have, 0);
            if (n <= 0 && errno != EAGAIN) { drop(fd); return; }
            if (n > 0) have += (size_t)n;
        }
        publish(body, want);
        static const char done[] = "HTTP/1.1 201 \r\ncontent-length: 0\r\n\r\n";
        if (send(fd, done, sizeof done - 1, MSG_NOSIGNAL) < 0) drop(fd);
    } else {
        static const char done[] = "HTTP/1.1 204 \r\n\r\n";
        if (send(fd, done, sizeof done - 1, MSG_NOSIGNAL) < 0) drop(fd);
    }
}

static void accept_all(int listener)
{
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        int on = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (fd >= MAX_DESCRIPTORS) { close(fd); continue; }
        place[fd] = -1;
        struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e);
    }
}

int main(int argc, char **argv)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGPIPE, SIG_IGN);
    if (argc < 2) {
        fprintf(stderr, "usage: floor PORT [HEARTBEAT_SECONDS]\n");
        return 2;
    }
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1]))};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 4096)) {
        fprintf(stderr, "floor: port %s: %s\n", argv[1], strerror(errno));
        return 2;
    }
    poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &e);
    int seconds = argc > 2 ? atoi(argv[2]) : 0, timer = -1, turn = 0;
    if (seconds > 0) {
        /* Each second serves its share of the streams, as servers with spread
           heartbeats do. */
        timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
        struct itimerspec every = {{1, 0}, {1, 0}};
        timerfd_settime(timer, 0, &every, NULL);
        e.data.fd = timer;
        epoll_ctl(poller, EPOLL_CTL_ADD, timer, &e);
    }
    struct epoll_event ready[BATCH];
    for (;;) {
        int n = epoll_wait(poller, ready, BATCH, -1);
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd == listener) accept_all(listener);
            else if (fd == timer) {
                uint64_t ticks;
                if (read(timer, &ticks, sizeof ticks) < 0) continue;
                turn = (turn + 1) % seconds;
                for (int k = stream_count - 1; k >= 0; k--)
                    if (streams[k] % seconds == turn
                        && send(streams[k], heartbeat, sizeof heartbeat - 1,
                                MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
                        drop(streams[k]);
            } else serve(fd);
        }
    }
}
