/*
 * The load client: hold N event streams, drain them, and prove what they carried.
 *
 * It reads commands from standard input, one a line, and answers each with one
 * line of JSON. Between commands it goes on draining. One thread, one epoll.
 *
 *   target HOST PORT                  add an address
 *   add N TARGET PATH KEYS            N streams on target number TARGET (from 0);
 *                                     KEYS are the numbers of their topics: 0,3;
 *                                     PATH#TOKEN sends a bearer token
 *   base KEY SEQ                      streams that open without an id expect SEQ+1
 *   final KEY SEQ                     SEQ is the last one published
 *   connect CONCURRENCY MS            open every closed stream, resuming where an
 *                                     id is known; answers when all are open
 *   wait MS                           answers when every stream has read up to final
 *   close                             close every stream, keep ids and counts
 *   churn COUNT CONCURRENCY TARGET PATH MS   open and close COUNT streams
 *   probe TARGET PATH EVERY_MS MS     one request at a time on one connection
 *   sources N                         connect from N loopback addresses
 *   nap MICROSECONDS                  rest so long between turns (0: never)
 *   clear                             forget all faults, not what comes next
 *   mark                              begin a measured phase
 *   report                            what this phase measured, and all faults
 *   streams                           faults of each stream
 *   quit
 *
 * The data of a measured event begins "k=KEY n=SEQ t=NANOSECONDS " (decimal,
 * CLOCK_MONOTONIC) and ends in "$"; SEQ counts up by one for each KEY. Any other
 * event is counted and otherwise ignored.
 *
 * A stream counts as open when its head said 200 and text/event-stream and the
 * first block of its body, event or comment, has ended: then the server has
 * subscribed it.
 *
 * Exit code 2: wrong command or no memory. The process ends with its parent.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH 512
#define READ_SIZE 65536
#define MAX_HEAD 16384
#define MAX_BLOCK (4 << 20)
#define MAX_ID 128
#define MAX_KEYS 1024
#define MAX_TARGETS 64
#define BUCKETS 1400
/* Every 32nd stream carries the kernel's time of receipt: enough to see whether
   this client lags, too few to cost anything. */
#define LAG_SAMPLE 32
#define LAG_SLOT_NS 100000000LL
#define LAG_SLOTS 6000

enum state { CLOSED, CONNECTING, HEAD, OPENING, OPEN };
enum framing { RAW, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, ENDED };

struct gap { uint64_t from, to; };

/* What one stream has read of one topic. */
struct pair {
    uint32_t key, gaps_used, gaps_room;
    uint64_t next;              /* the sequence number expected next */
    struct gap *gaps;           /* skipped and not seen since */
};

struct stream {
    int fd;
    uint8_t state, framing, known, sampled;
    uint16_t target, pairs_used;
    uint32_t rest_used;
    uint64_t chunk_left;
    int64_t began;
    char *rest;                 /* head or block that has not ended yet */
    const char *path;
    struct pair *pairs;
    uint64_t events, missing, dup, order;
    uint8_t churned, lost;
    char id[MAX_ID];
};

struct histogram { uint64_t count, max, bucket[BUCKETS]; };

static struct sockaddr_in targets[MAX_TARGETS];
static unsigned target_count, source_count = 1, source_turn;
static struct stream **streams;
static unsigned stream_count, stream_room, open_count;
static uint64_t base_of[MAX_KEYS], final_of[MAX_KEYS];
static int poller;
static unsigned nap_us;

/* Counts since the start. */
static uint64_t opened, lost, foreign, corrupt, others;
/* Counts of the phase. */
static uint64_t events, bytes, reads;
static struct histogram latency, connects, lag;
static int64_t phase_start, phase_rest;
static double phase_cpu;
static struct { uint64_t sum, count; } lag_slot[LAG_SLOTS];

/* Failed connects by reason. */
static struct { char why[40]; uint64_t count; } failures[32];
static unsigned failure_kinds;

/* The command that has not been answered yet. */
static enum { NONE, CONNECT, WAIT, CHURN, PROBE } pending;
static int64_t deadline, pending_since;
static unsigned in_flight, next_closed, concurrency;
static uint64_t pairs_behind, failed;
static uint64_t churn_left, churn_done;
static unsigned churn_target, churn_live, churn_room;
static char *churn_path;
static struct stream **churners;
static struct { int fd; unsigned target; int64_t sent, due, every; char *path; int busy;
                uint64_t tail; struct histogram times; uint64_t bad; } probe = {.fd = -1};

static void die(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fputc('\n', stderr);
    exit(2);
}

static void *must(void *memory)
{
    if (!memory) die("client: out of memory");
    return memory;
}

static int64_t now_of(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int64_t now(void) { return now_of(CLOCK_MONOTONIC); }
static double own_cpu(void) { return (double)now_of(CLOCK_PROCESS_CPUTIME_ID) / 1e9; }

/* Buckets are exact below 64 and 1/32 of their value wide above (3 %). */
static void record(struct histogram *h, int64_t value)
{
    uint64_t v = value < 0 ? 0 : (uint64_t)value;
    unsigned index = (unsigned)v;
    if (v >= 64) {
        unsigned high = 63 - (unsigned)__builtin_clzll(v);
        index = 64 + (high - 6) * 32 + ((v >> (high - 5)) & 31);
        if (index >= BUCKETS) index = BUCKETS - 1;
    }
    h->bucket[index]++;
    h->count++;
    if (v > h->max) h->max = v;
}

static void print_histogram(const char *name, const struct histogram *h)
{
    printf("\"%s\":{\"count\":%llu,\"max\":%llu,\"buckets\":{", name,
           (unsigned long long)h->count, (unsigned long long)h->max);
    const char *comma = "";
    for (unsigned i = 0; i < BUCKETS; i++)
        if (h->bucket[i]) {
            printf("%s\"%u\":%llu", comma, i, (unsigned long long)h->bucket[i]);
            comma = ",";
        }
    printf("}}");
}

static void fail(const char *why)
{
    failed++;
    for (unsigned i = 0; i < failure_kinds; i++)
        if (!strcmp(failures[i].why, why)) { failures[i].count++; return; }
    if (failure_kinds < 32) {
        snprintf(failures[failure_kinds].why, sizeof failures[0].why, "%s", why);
        failures[failure_kinds++].count = 1;
    }
}

static void end_stream(struct stream *s, int by_us)
{
    if (s->fd < 0) return;
    close(s->fd);
    s->fd = -1;
    if (s->state == OPEN && !s->churned) {
        open_count--;
        if (!by_us) {
            lost++;
            s->lost = 1;
            if (pending == WAIT)
                for (unsigned i = 0; i < s->pairs_used; i++)
                    if (s->pairs[i].next <= final_of[s->pairs[i].key]) pairs_behind--;
        }
    }
    if (s->churned) churn_live--;
    else if (s->state > CLOSED && s->state < OPEN && in_flight) in_flight--;
    s->state = CLOSED;
    s->rest_used = 0;
    free(s->rest);
    s->rest = NULL;
}

/* The sequence number *n* was read: count what that says about the stream. */
static void see(struct stream *s, struct pair *p, uint64_t n)
{
    uint64_t before = p->next;
    if (n == p->next) {
        p->next++;
    } else if (n > p->next) {
        if (p->gaps_used == p->gaps_room) {
            p->gaps_room = p->gaps_room ? 2 * p->gaps_room : 4;
            p->gaps = must(realloc(p->gaps, p->gaps_room * sizeof *p->gaps));
        }
        p->gaps[p->gaps_used++] = (struct gap){p->next, n - 1};
        s->missing += n - p->next;
        p->next = n + 1;
    } else {
        for (unsigned i = 0; i < p->gaps_used; i++) {
            struct gap *g = &p->gaps[i];
            if (n < g->from || n > g->to) continue;
            s->missing--;
            s->order++;
            uint64_t to = g->to;
            if (g->from == g->to) {
                *g = p->gaps[--p->gaps_used];
            } else if (n == g->from) {
                g->from++;
            } else if (n == g->to) {
                g->to--;
            } else {
                g->to = n - 1;
                if (p->gaps_used == p->gaps_room) {
                    p->gaps_room *= 2;
                    p->gaps = must(realloc(p->gaps, p->gaps_room * sizeof *p->gaps));
                }
                p->gaps[p->gaps_used++] = (struct gap){n + 1, to};
            }
            return;
        }
        s->dup++;
        return;
    }
    if (pending == WAIT && before <= final_of[p->key] && p->next > final_of[p->key])
        pairs_behind--;
}

static const char *number(const char *at, const char *end, uint64_t *value)
{
    const char *start = at;
    uint64_t v = 0;
    while (at < end && *at >= '0' && *at <= '9') v = v * 10 + (uint64_t)(*at++ - '0');
    *value = v;
    return at == start ? NULL : at;
}

static void dispatch(struct stream *s, const char *data, size_t size, int64_t read_at)
{
    const char *end = data + size, *at = data;
    uint64_t key, n, sent;
    if (s->churned) return;
    if (size < 2 || data[0] != 'k' || data[1] != '=') { others++; return; }
    if (!(at = number(at + 2, end, &key)) || end - at < 3 || memcmp(at, " n=", 3)
        || !(at = number(at + 3, end, &n)) || end - at < 3 || memcmp(at, " t=", 3)
        || !(at = number(at + 3, end, &sent)) || end[-1] != '$' || n == 0) {
        corrupt++;
        return;
    }
    for (unsigned i = 0; i < s->pairs_used; i++)
        if (s->pairs[i].key == key) {
            s->events++;
            events++;
            record(&latency, (read_at - (int64_t)sent) / 1000);
            see(s, &s->pairs[i], n);
            return;
        }
    foreign++;
}

/*
 * Parse whole blocks; return how many bytes were used.
 *
 * Lines end in LF or CRLF: no server measured here writes a bare CR.
 */
static size_t parse(struct stream *s, const char *from, size_t size, int64_t read_at)
{
    const char *end = from + size, *block = from, *line = from;
    const char *data = NULL, *id = NULL;
    size_t data_size = 0, id_size = 0;
    const char *newline;
    int seen = 0;
    while ((newline = memchr(line, '\n', (size_t)(end - line)))) {
        size_t length = (size_t)(newline - line);
        if (length && line[length - 1] == '\r') length--;
        if (length == 0) {
            if (id) {
                if (id_size < MAX_ID) {
                    memcpy(s->id, id, id_size);
                    s->id[id_size] = 0;
                } else corrupt++;
            }
            if (data) dispatch(s, data, data_size, read_at);
            data = id = NULL;
            block = newline + 1;
            seen = 1;
        } else if (length >= 5 && !memcmp(line, "data:", 5)) {
            /* Measured data is one line; of longer data the first line is enough. */
            if (!data) {
                data = line + 5;
                data_size = length - 5;
                if (data_size && *data == ' ') { data++; data_size--; }
            }
        } else if (length >= 3 && !memcmp(line, "id:", 3)) {
            id = line + 3;
            id_size = length - 3;
            if (id_size && *id == ' ') { id++; id_size--; }
        }
        line = newline + 1;
    }
    if (seen && s->state == OPENING) {
        s->state = OPEN;
        record(&connects, (read_at - s->began) / 1000);
        if (s->churned) {
            churn_done++;
        } else {
            in_flight--;
            open_count++;
            opened++;
            s->known = 1;
        }
    }
    return (size_t)(block - from);
}

static void keep(struct stream *s, const char *from, size_t size)
{
    if (size > MAX_BLOCK) die("client: a block is longer than %d bytes", MAX_BLOCK);
    if (size) {
        char *rest = must(malloc(size));
        memcpy(rest, from, size);
        free(s->rest);
        s->rest = rest;
    } else {
        free(s->rest);
        s->rest = NULL;
    }
    s->rest_used = (uint32_t)size;
}

/* Join what was kept with the body bytes of *from*, without chunk framing. */
static void take_body(struct stream *s, char *from, size_t size, int64_t read_at)
{
    static char *joined;
    static size_t room;
    if (s->rest_used + size > room) {
        room = 2 * (s->rest_used + size) + READ_SIZE;
        joined = must(realloc(joined, room));
    }
    size_t used = s->rest_used;
    if (used) memcpy(joined, s->rest, used);
    char *end = from + size;
    while (from < end) {
        if (s->framing == RAW || s->framing == CHUNK_DATA) {
            size_t n = (size_t)(end - from);
            if (s->framing == CHUNK_DATA && n > s->chunk_left) n = s->chunk_left;
            memcpy(joined + used, from, n);
            used += n;
            from += n;
            if (s->framing == CHUNK_DATA && !(s->chunk_left -= n)) s->framing = CHUNK_END;
        } else if (s->framing == CHUNK_END) {
            if (*from++ == '\n') s->framing = CHUNK_SIZE;
        } else if (s->framing == CHUNK_SIZE) {
            char c = *from++;
            if (c >= '0' && c <= '9') s->chunk_left = s->chunk_left * 16 + (uint64_t)(c - '0');
            else if ((c | 32) >= 'a' && (c | 32) <= 'f')
                s->chunk_left = s->chunk_left * 16 + (uint64_t)((c | 32) - 'a' + 10);
            else if (c == '\n') s->framing = s->chunk_left ? CHUNK_DATA : ENDED;
            else if (c != '\r') { corrupt++; s->framing = ENDED; }
        } else break;
    }
    size_t parsed = parse(s, joined, used, read_at);
    keep(s, joined + parsed, used - parsed);
}

static void take_head(struct stream *s, char *from, size_t size, int64_t read_at)
{
    char head[MAX_HEAD + 1];
    if (s->rest_used + size > MAX_HEAD) {
        /* The body may follow in the same read: look at the head's share only. */
        size_t share = MAX_HEAD - s->rest_used;
        if (!memmem(from, share, "\r\n\r\n", 4)) {
            fail("head too long");
            end_stream(s, 1);
            return;
        }
    }
    size_t kept = s->rest_used;
    size_t copied = size < MAX_HEAD - kept ? size : MAX_HEAD - kept;
    if (kept) memcpy(head, s->rest, kept);
    memcpy(head + kept, from, copied);
    head[kept + copied] = 0;
    char *ending = memmem(head, kept + copied, "\r\n\r\n", 4);
    if (!ending) {
        keep(s, head, kept + copied);
        return;
    }
    *ending = 0;
    keep(s, NULL, 0);
    int status = strlen(head) > 12 ? atoi(head + 9) : 0;
    if (status != 200) {
        char why[40];
        snprintf(why, sizeof why, "status %d", status);
        fail(why);
        end_stream(s, 1);
        return;
    }
    if (!strcasestr(head, "\r\ncontent-type: text/event-stream")) {
        fail("not text/event-stream");
        end_stream(s, 1);
        return;
    }
    s->framing = strcasestr(head, "\r\ntransfer-encoding: chunked") ? CHUNK_SIZE : RAW;
    s->chunk_left = 0;
    s->state = OPENING;
    for (unsigned i = 0; !s->known && i < s->pairs_used; i++)
        s->pairs[i].next = base_of[s->pairs[i].key] + 1;
    size_t skip = (size_t)(ending + 4 - head) - kept;
    if (size > skip) take_body(s, from + skip, size - skip, read_at);
}

static int local_address(int fd)
{
    if (source_count < 2) return 0;
    struct sockaddr_in from = {.sin_family = AF_INET};
    from.sin_addr.s_addr = htonl(0x7f000001u + (source_turn++ % source_count));
    int on = 1;
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    return bind(fd, (struct sockaddr *)&from, sizeof from);
}

static void start(struct stream *s)
{
    s->began = now();
    s->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (s->fd < 0 || local_address(s->fd)) {
        fail(strerror(errno));
        if (s->fd >= 0) close(s->fd);
        s->fd = -1;
        if (s->churned) churn_live--;
        return;
    }
    int on = 1;
    setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (s->sampled) setsockopt(s->fd, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
    s->state = CONNECTING;
    if (!s->churned) in_flight++;
    if (connect(s->fd, (struct sockaddr *)&targets[s->target], sizeof targets[0])
        && errno != EINPROGRESS) {
        fail(strerror(errno));
        end_stream(s, 1);
        return;
    }
    struct epoll_event e = {.events = EPOLLOUT, .data.ptr = s};
    epoll_ctl(poller, EPOLL_CTL_ADD, s->fd, &e);
}

static void request(struct stream *s)
{
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        fail(strerror(error));
        end_stream(s, 1);
        return;
    }
    char text[2048];
    /* What a path has behind a '#' is no part of the request's target: a token. */
    size_t length = strcspn(s->path, "#");
    const char *token = s->path[length] ? s->path + length + 1 : "";
    int n = snprintf(text, sizeof text,
                     "GET %.*s HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n"
                     "Cache-Control: no-store\r\n%s%s%s%s%s%s\r\n", (int)length, s->path,
                     token[0] ? "Authorization: Bearer " : "", token, token[0] ? "\r\n" : "",
                     s->id[0] ? "Last-Event-ID: " : "", s->id, s->id[0] ? "\r\n" : "");
    if (n >= (int)sizeof text || send(s->fd, text, (size_t)n, MSG_NOSIGNAL) != n) {
        fail("request not sent");
        end_stream(s, 1);
        return;
    }
    s->state = HEAD;
    /* Edge triggered: readable() reads until nothing is left. */
    struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP | EPOLLET, .data.ptr = s};
    epoll_ctl(poller, EPOLL_CTL_MOD, s->fd, &e);
}

static ssize_t receive(struct stream *s, char *buffer)
{
    if (!s->sampled) return recv(s->fd, buffer, READ_SIZE, 0);
    union { struct cmsghdr head; char room[256]; } control;
    struct iovec piece = {buffer, READ_SIZE};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1,
                             .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t n = recvmsg(s->fd, &message, 0);
    if (n <= 0 || s->state != OPEN) return n;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_TIMESTAMPNS) {
            struct timespec at;
            memcpy(&at, CMSG_DATA(c), sizeof at);
            int64_t behind = now_of(CLOCK_REALTIME)
                             - ((int64_t)at.tv_sec * 1000000000LL + at.tv_nsec);
            if (behind < 0) behind = 0;
            record(&lag, behind / 1000);
            int64_t slot = (now() - phase_start) / LAG_SLOT_NS;
            if (slot >= 0 && slot < LAG_SLOTS) {
                lag_slot[slot].sum += (uint64_t)(behind / 1000);
                lag_slot[slot].count++;
            }
        }
    return n;
}

static void readable(struct stream *s, int hung_up)
{
    static char buffer[READ_SIZE];
    ssize_t n = READ_SIZE;
    /* A read that did not fill the buffer emptied the socket, unless the stream's
       end is behind it: that is read too, for no edge follows it. */
    for (int last = 0; s->fd >= 0 && !last;) {
        n = receive(s, buffer);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) {
            if (s->state < OPEN) fail(n ? strerror(errno) : "closed before it opened");
            end_stream(s, 0);
            return;
        }
        last = n < READ_SIZE && !hung_up;
        bytes += (uint64_t)n;
        reads++;
        int64_t at = now();
        if (s->state == HEAD) take_head(s, buffer, (size_t)n, at);
        else take_body(s, buffer, (size_t)n, at);
        if (s->fd >= 0 && s->framing == ENDED && s->state >= OPENING) {
            if (s->state < OPEN) fail("ended before it opened");
            end_stream(s, 0);
        }
        if (s->fd >= 0 && s->churned && s->state == OPEN) end_stream(s, 1);
    }
}

/* --- commands ------------------------------------------------------------ */

static void print_failures(void)
{
    printf("\"failed\":%llu,\"why\":{", (unsigned long long)failed);
    for (unsigned i = 0; i < failure_kinds; i++)
        printf("%s\"%s\":%llu", i ? "," : "", failures[i].why,
               (unsigned long long)failures[i].count);
    printf("}");
}

static void answer(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vprintf(format, list);
    va_end(list);
    putchar('\n');
    fflush(stdout);
}

static void begin(int what, int64_t milliseconds)
{
    pending = what;
    pending_since = now();
    deadline = pending_since + milliseconds * 1000000LL;
    failed = 0;
    failure_kinds = 0;
}

static void add_streams(unsigned n, unsigned target, const char *path, char *keys)
{
    uint32_t list[MAX_KEYS];
    unsigned used = 0;
    for (char *word = strtok(keys, ","); word; word = strtok(NULL, ",")) {
        unsigned long key = strtoul(word, NULL, 10);
        if (key >= MAX_KEYS || used == MAX_KEYS) die("client: key %s is out of range", word);
        list[used++] = (uint32_t)key;
    }
    if (target >= target_count) die("client: there is no target %u", target);
    const char *kept = must(strdup(path));
    for (unsigned i = 0; i < n; i++) {
        if (stream_count == stream_room) {
            stream_room = stream_room ? 2 * stream_room : 1024;
            streams = must(realloc(streams, stream_room * sizeof *streams));
        }
        struct stream *s = must(calloc(1, sizeof *s));
        s->fd = -1;
        s->target = (uint16_t)target;
        s->path = kept;
        s->pairs = must(calloc(used, sizeof *s->pairs));
        s->pairs_used = (uint16_t)used;
        for (unsigned k = 0; k < used; k++) s->pairs[k].key = list[k];
        s->sampled = stream_count % LAG_SAMPLE == 0;
        streams[stream_count++] = s;
    }
}

static uint64_t tail_of(const struct stream *s)
{
    uint64_t missing = 0;
    if (s->known)
        for (unsigned i = 0; i < s->pairs_used; i++)
            if (s->pairs[i].next <= final_of[s->pairs[i].key])
                missing += final_of[s->pairs[i].key] - s->pairs[i].next + 1;
    return missing;
}

static void mark(void)
{
    events = bytes = reads = 0;
    memset(&latency, 0, sizeof latency);
    memset(&connects, 0, sizeof connects);
    memset(&lag, 0, sizeof lag);
    memset(lag_slot, 0, sizeof lag_slot);
    phase_start = now();
    phase_rest = 0;
    phase_cpu = own_cpu();
}

/* Mean read lag of the first and of the last third of the phase. */
static void lag_trend(uint64_t *first, uint64_t *last)
{
    int64_t slots = (now() - phase_start) / LAG_SLOT_NS + 1;
    if (slots > LAG_SLOTS) slots = LAG_SLOTS;
    uint64_t sum[2] = {0, 0}, count[2] = {0, 0};
    for (int64_t i = 0; i < slots; i++) {
        int part = i < (slots + 2) / 3 ? 0 : i >= slots - (slots + 2) / 3 ? 1 : -1;
        if (part < 0) continue;
        sum[part] += lag_slot[i].sum;
        count[part] += lag_slot[i].count;
    }
    *first = count[0] ? sum[0] / count[0] : 0;
    *last = count[1] ? sum[1] / count[1] : 0;
}

static void report(void)
{
    uint64_t missing = 0, dup = 0, order = 0, faulty = 0, first, last;
    for (unsigned i = 0; i < stream_count; i++) {
        struct stream *s = streams[i];
        uint64_t m = s->missing + tail_of(s);
        missing += m;
        dup += s->dup;
        order += s->order;
        faulty += m || s->dup || s->order || s->lost;
    }
    int64_t wall = now() - phase_start;
    lag_trend(&first, &last);
    printf("{\"streams\":%u,\"open\":%u,\"opened\":%llu,\"lost\":%llu,\"events\":%llu,"
           "\"bytes\":%llu,\"reads\":%llu,\"others\":%llu,\"missing\":%llu,\"dup\":%llu,"
           "\"order\":%llu,\"foreign\":%llu,\"corrupt\":%llu,\"faulty\":%llu,"
           "\"wall\":%.6f,\"cpu\":%.6f,\"busy\":%.6f,\"lag_first_us\":%llu,\"lag_last_us\":%llu,",
           stream_count, open_count, (unsigned long long)opened, (unsigned long long)lost,
           (unsigned long long)events, (unsigned long long)bytes, (unsigned long long)reads,
           (unsigned long long)others, (unsigned long long)missing, (unsigned long long)dup,
           (unsigned long long)order, (unsigned long long)foreign, (unsigned long long)corrupt,
           (unsigned long long)faulty, (double)wall / 1e9, own_cpu() - phase_cpu,
           (double)(wall - phase_rest) / 1e9, (unsigned long long)first,
           (unsigned long long)last);
    print_histogram("latency", &latency);
    putchar(',');
    print_histogram("connects", &connects);
    putchar(',');
    print_histogram("lag", &lag);
    answer("}");
}

static void list_streams(void)
{
    putchar('[');
    for (unsigned i = 0; i < stream_count; i++) {
        struct stream *s = streams[i];
        printf("%s{\"open\":%s,\"events\":%llu,\"missing\":%llu,\"dup\":%llu,\"order\":%llu,"
               "\"lost\":%u,\"id\":\"", i ? "," : "", s->state == OPEN ? "true" : "false",
               (unsigned long long)s->events,
               (unsigned long long)(s->missing + tail_of(s)), (unsigned long long)s->dup,
               (unsigned long long)s->order, s->lost);
        for (char *c = s->id; *c; c++)
            if (*c == '"' || *c == '\\') printf("\\%c", *c);
            else if ((unsigned char)*c < 32) printf("\\u%04x", *c);
            else putchar(*c);
        printf("\"}");
    }
    answer("]");
}

static void probe_send(void)
{
    char text[1024];
    if (probe.fd < 0) {
        probe.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(probe.fd, (struct sockaddr *)&targets[probe.target], sizeof targets[0])) {
            close(probe.fd);
            probe.fd = -1;
            probe.bad++;
            return;
        }
        fcntl(probe.fd, F_SETFL, O_NONBLOCK);
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = &probe};
        epoll_ctl(poller, EPOLL_CTL_ADD, probe.fd, &e);
    }
    int n = snprintf(text, sizeof text, "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n", probe.path);
    if (send(probe.fd, text, (size_t)n, MSG_NOSIGNAL) != n) probe.bad++;
    probe.sent = now();
    probe.busy = 1;
}

static void probe_read(void)
{
    char text[4096];
    ssize_t n = recv(probe.fd, text, sizeof text, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        close(probe.fd);
        probe.fd = -1;
        if (probe.busy) probe.bad++;
        probe.busy = 0;
        return;
    }
    /* The last answer's body may come in a packet of its own, before this head. */
    char *head = memmem(text, (size_t)n, "HTTP/1.1 ", 9);
    if (!probe.busy || !head || head + 12 > text + n) return;
    if (strncmp(head + 9, "200", 3) && strncmp(head + 9, "204", 3)) probe.bad++;
    record(&probe.times, (now() - probe.sent) / 1000);
    probe.busy = 0;
}

/* Advance the command that waits; answer it when it is done or out of time. */
static void advance(void)
{
    int late = now() > deadline;
    if (pending == CONNECT) {
        while (!late && in_flight < concurrency && next_closed < stream_count) {
            struct stream *s = streams[next_closed++];
            if (s->state == CLOSED) { s->lost = 0; start(s); }
        }
        if (late || (next_closed == stream_count && !in_flight)) {
            if (late)
                for (unsigned i = 0; i < stream_count; i++)
                    if (streams[i]->state > CLOSED && streams[i]->state < OPEN) {
                        fail("timeout");
                        end_stream(streams[i], 1);
                    }
            pending = NONE;
            printf("{\"open\":%u,\"seconds\":%.6f,", open_count,
                   (double)(now() - pending_since) / 1e9);
            print_failures();
            answer("}");
        }
    } else if (pending == WAIT) {
        if (late || !pairs_behind) {
            pending = NONE;
            answer("{\"behind\":%llu,\"at\":%lld}", (unsigned long long)pairs_behind,
                   (long long)now());
        }
    } else if (pending == CHURN) {
        for (unsigned i = 0; i < concurrency && !late && churn_left && churn_live < concurrency; i++)
            if (churners[i]->fd < 0) {
                struct stream *s = churners[i];
                s->target = (uint16_t)churn_target;
                s->path = churn_path;
                s->id[0] = 0;
                churn_left--;
                churn_live++;
                start(s);
            }
        if (late || (!churn_left && !churn_live)) {
            for (unsigned i = 0; i < concurrency; i++)
                if (churners[i]->fd >= 0) {
                    fail("timeout");
                    end_stream(churners[i], 1);
                }
            pending = NONE;
            printf("{\"done\":%llu,\"seconds\":%.6f,", (unsigned long long)churn_done,
                   (double)(now() - pending_since) / 1e9);
            print_failures();
            answer("}");
        }
    } else if (pending == PROBE) {
        if (late && !(probe.busy && now() < deadline + 5000000000LL)) {
            pending = NONE;
            close(probe.fd);
            probe.fd = -1;
            printf("{\"bad\":%llu,", (unsigned long long)probe.bad);
            print_histogram("times", &probe.times);
            answer("}");
        } else if (!probe.busy && !late && now() >= probe.due) {
            probe.due = now() + probe.every;
            probe_send();
        }
    }
}

static void command(char *line)
{
    char word[16], text[1024], keys[4096];
    unsigned a, b, c;
    unsigned long long n, m;
    if (sscanf(line, "%15s", word) != 1) return;
    if (pending) die("client: '%s' came before the last command was answered", line);
    if (sscanf(line, "target %1023s %u", text, &a) == 2) {
        struct sockaddr_in *t = &targets[target_count];
        t->sin_family = AF_INET;
        t->sin_port = htons((uint16_t)a);
        if (target_count == MAX_TARGETS || inet_pton(AF_INET, text, &t->sin_addr) != 1)
            die("client: target '%s' must be an IPv4 address, at most %d", text, MAX_TARGETS);
        target_count++;
        answer("{}");
    } else if (sscanf(line, "add %u %u %1023s %4095s", &a, &b, text, keys) == 4) {
        add_streams(a, b, text, keys);
        answer("{}");
    } else if (sscanf(line, "base %u %llu", &a, &n) == 2 && a < MAX_KEYS) {
        base_of[a] = n;
        answer("{}");
    } else if (sscanf(line, "final %u %llu", &a, &n) == 2 && a < MAX_KEYS) {
        final_of[a] = n;
        answer("{}");
    } else if (sscanf(line, "connect %u %llu", &a, &n) == 2 && a) {
        concurrency = a;
        next_closed = 0;
        begin(CONNECT, (int64_t)n);
    } else if (sscanf(line, "wait %llu", &n) == 1) {
        pairs_behind = 0;
        for (unsigned i = 0; i < stream_count; i++)
            for (unsigned k = 0; streams[i]->state == OPEN && k < streams[i]->pairs_used; k++)
                pairs_behind += streams[i]->pairs[k].next <= final_of[streams[i]->pairs[k].key];
        begin(WAIT, (int64_t)n);
    } else if (sscanf(line, "churn %llu %u %u %1023s %llu", &n, &a, &b, text, &m) == 5 && a) {
        if (b >= target_count) die("client: there is no target %u", b);
        free(churn_path);
        churn_path = must(strdup(text));
        for (unsigned i = 0; i < churn_room; i++) free(churners[i]);
        churn_room = a;
        churners = must(realloc(churners, a * sizeof *churners));
        for (unsigned i = 0; i < a; i++) {
            churners[i] = must(calloc(1, sizeof **churners));
            churners[i]->fd = -1;
            churners[i]->churned = 1;
        }
        concurrency = a;
        churn_target = b;
        churn_left = n;
        churn_done = 0;
        begin(CHURN, (int64_t)m);
    } else if (sscanf(line, "probe %u %1023s %u %llu", &a, text, &c, &n) == 4) {
        if (a >= target_count) die("client: there is no target %u", a);
        free(probe.path);
        memset(&probe, 0, sizeof probe);
        probe.fd = -1;
        probe.path = must(strdup(text));
        probe.target = a;
        probe.every = (int64_t)c * 1000000LL;
        begin(PROBE, (int64_t)n);
    } else if (sscanf(line, "sources %u", &a) == 1 && a >= 1 && a <= 250) {
        source_count = a;
        answer("{}");
    } else if (sscanf(line, "nap %u", &a) == 1) {
        nap_us = a;
        answer("{}");
    } else if (!strcmp(word, "close")) {
        for (unsigned i = 0; i < stream_count; i++) end_stream(streams[i], 1);
        answer("{}");
    } else if (!strcmp(word, "clear")) {
        lost = foreign = corrupt = 0;
        for (unsigned i = 0; i < stream_count; i++) {
            struct stream *s = streams[i];
            s->missing = s->dup = s->order = s->lost = 0;
            for (unsigned k = 0; k < s->pairs_used; k++) s->pairs[k].gaps_used = 0;
        }
        answer("{}");
    } else if (!strcmp(word, "mark")) {
        mark();
        answer("{}");
    } else if (!strcmp(word, "report")) report();
    else if (!strcmp(word, "streams")) list_streams();
    else if (!strcmp(word, "quit")) exit(0);
    else die("client: unknown command '%s'", line);
}

static void read_commands(void)
{
    static char input[65536];
    static size_t used;
    ssize_t n = read(0, input + used, sizeof input - used - 1);
    if (n <= 0) {
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
        exit(0);
    }
    used += (size_t)n;
    char *start = input, *newline;
    while ((newline = memchr(start, '\n', used - (size_t)(start - input)))) {
        *newline = 0;
        command(start);
        start = newline + 1;
    }
    used -= (size_t)(start - input);
    memmove(input, start, used);
}

int main(void)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGPIPE, SIG_IGN);
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(poller, EPOLL_CTL_ADD, 0, &e);
    mark();
    struct epoll_event ready[BATCH];
    for (;;) {
        /* A command that waits looks at the clock, so it wakes the loop. */
        int timeout = pending == PROBE ? 1 : pending == NONE ? -1 : 20;
        int64_t before = now();
        if (nap_us && open_count) {
            struct timespec pause = {0, (long)nap_us * 1000};
            nanosleep(&pause, NULL);
        }
        int n = epoll_wait(poller, ready, BATCH, timeout);
        phase_rest += now() - before;
        for (int i = 0; i < n; i++) {
            struct stream *s = ready[i].data.ptr;
            if (!s) read_commands();
            else if ((void *)s == (void *)&probe) probe_read();
            else if (s->fd < 0) continue;
            else if (s->state == CONNECTING) request(s);
            else readable(s, ready[i].events & (EPOLLHUP | EPOLLRDHUP | EPOLLERR));
        }
        if (pending) advance();
    }
}
