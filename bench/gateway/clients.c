/* Clients of event streams that note when each token arrives.
 *
 *   cc -O2 -o clients clients.c && ./clients PORT --clients N --tokens N --seconds S [--once] < REQUEST > RESULT.json
 *
 * Each client has one connection to 127.0.0.1 and sends the bytes of REQUEST on it, again as soon as its answer is whole,
 * for so many seconds; with --once each sends it once, and --seconds only guards against hanging. With --once the
 * requests begin within a second of each other, since nobody's thousand users begin in one moment.
 *
 * An answer is whole when it has the status 200, all its tokens, [DONE], and the end of its body; any other is lost.
 * Times of lost answers do not count. A token's time is that of the read() which brought it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { READ_BYTES = 256 * 1024, LINE_BYTES = 8192, REQUEST_BYTES = 65536, PROBLEM_BYTES = 160, EVENTS = 512 };
#define SPREAD_NS INT64_C(1000000000)

enum state { HEAD, SIZE, DATA, DATA_END, TRAILER, WHOLE }; /* of an answer, in HTTP's chunked coding (RFC 9112, 7.1) */

struct client {
    int fd;
    enum state state;
    int status, chunked, tokens, done;
    size_t chunk_left;
    size_t line_length, event_length;
    int64_t asked_ns, last_ns, first_ns;
    int64_t *gaps; /* of this answer; a lost one's are forgotten */
    size_t gap_count;
    char line[LINE_BYTES];  /* of the head, or of a chunk's size */
    char event[LINE_BYTES]; /* a line of the event stream */
};

struct times {
    int64_t *ns;
    size_t count, room;
};

static char request[REQUEST_BYTES];
static size_t request_length;
static int port, wanted_tokens = 64, once;
static int epoll_fd;
static long whole, lost, tokens_of_whole, connects;
static char problem[PROBLEM_BYTES];
static struct times firsts, gaps;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int64_t now_ns(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (int64_t)at.tv_sec * 1000000000 + at.tv_nsec;
}

static void note(struct times *of, int64_t ns)
{
    if (of->count == of->room) {
        of->room = of->room ? 2 * of->room : 4096;
        of->ns = realloc(of->ns, of->room * sizeof *of->ns);
        if (!of->ns)
            die("memory");
    }
    of->ns[of->count++] = ns;
}

/* ---- one answer */

static void begin(struct client *one)
{
    one->state = HEAD;
    one->status = one->chunked = one->tokens = one->done = 0;
    one->line_length = one->event_length = 0;
    one->gap_count = 0;
    one->first_ns = 0;
    one->asked_ns = now_ns();
}

static void take_event_line(struct client *one, int64_t at_ns)
{
    const char *line = one->event, *text;
    one->event[one->event_length] = 0;
    one->event_length = 0;
    if (!strncmp(line, "data: [DONE]", 12))
        one->done = 1;
    if (strncmp(line, "data: {", 7))
        return;
    text = strstr(line, "\"content\":\"");
    if (!text || text[11] == '"') /* a role, a reason, usage */
        return;
    if (one->tokens == 0)
        one->first_ns = at_ns;
    else if (one->tokens < wanted_tokens)
        one->gaps[one->gap_count++] = at_ns - one->last_ns;
    one->last_ns = at_ns;
    one->tokens++;
}

static void take_data(struct client *one, const char *bytes, size_t length, int64_t at_ns)
{
    while (length) {
        const char *end = memchr(bytes, '\n', length);
        size_t here = end ? (size_t)(end - bytes) : length;
        size_t room = LINE_BYTES - 1 - one->event_length, kept = here < room ? here : room;
        memcpy(one->event + one->event_length, bytes, kept);
        one->event_length += kept;
        if (!end)
            return;
        take_event_line(one, at_ns);
        bytes = end + 1;
        length -= here + 1;
    }
}

static void take_head_line(struct client *one)
{
    const char *line = one->line;
    if (!strncmp(line, "HTTP/1.1 ", 9))
        one->status = atoi(line + 9);
    if (!strncasecmp(line, "transfer-encoding:", 18) && strcasestr(line, "chunked"))
        one->chunked = 1;
}

/* Take a line of the head, of a chunk's size or of the trailer. Returns -1 when the answer cannot be understood. */
static int take_line(struct client *one)
{
    while (one->line_length && strchr("\r\n", one->line[one->line_length - 1]))
        one->line_length--;
    one->line[one->line_length] = 0;
    size_t length = one->line_length;
    one->line_length = 0;
    switch (one->state) {
    case HEAD:
        if (length) {
            take_head_line(one);
            return 0;
        }
        one->state = SIZE;
        return one->status == 200 && one->chunked ? 0 : -1;
    case SIZE:
        one->chunk_left = strtoul(one->line, NULL, 16);
        one->state = one->chunk_left ? DATA : TRAILER;
        return 0;
    case DATA_END:
        one->state = SIZE;
        return 0;
    default:
        if (!length)
            one->state = WHOLE;
        return 0;
    }
}

/* Take what was read. Returns -1 when the answer cannot be understood. */
static int take(struct client *one, const char *bytes, size_t length, int64_t at_ns)
{
    while (length && one->state != WHOLE) {
        if (one->state == DATA) {
            size_t here = length < one->chunk_left ? length : one->chunk_left;
            take_data(one, bytes, here, at_ns);
            one->chunk_left -= here;
            bytes += here;
            length -= here;
            if (!one->chunk_left)
                one->state = DATA_END;
            continue;
        }
        if (one->line_length < LINE_BYTES - 1)
            one->line[one->line_length++] = *bytes;
        length--;
        if (*bytes++ == '\n' && take_line(one) < 0)
            return -1;
    }
    return length ? -1 : 0; /* bytes after the end of the answer were not asked for */
}

/* ---- connections */

static void connect_to(struct client *one)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = one};
    one->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (one->fd < 0 || connect(one->fd, (struct sockaddr *)&at, sizeof at) < 0)
        die("connect");
    connects++;
    setsockopt(one->fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, one->fd, &event) < 0)
        die("epoll_ctl");
}

static void ask(struct client *one)
{
    begin(one);
    /* A request is smaller than any socket's buffer, so that it goes in one piece; a lost connection shows at a read. */
    if (send(one->fd, request, request_length, MSG_NOSIGNAL) < 0 && errno != EPIPE && errno != ECONNRESET)
        die("send");
}

static void count_whole(struct client *one)
{
    whole++;
    tokens_of_whole += one->tokens;
    note(&firsts, one->first_ns - one->asked_ns);
    for (size_t at = 0; at < one->gap_count; at++)
        note(&gaps, one->gaps[at]);
}

static void count_lost(struct client *one, const char *why)
{
    lost++;
    if (*problem)
        return;
    if (one->status && one->status != 200)
        snprintf(problem, sizeof problem, "status %d", one->status);
    else
        snprintf(problem, sizeof problem, "%s after %d of %d tokens, %s [DONE]", why, one->tokens, wanted_tokens,
                 one->done ? "with" : "without");
}

/* Read once. Returns 1 when the client's answer came to its end, whole or lost. */
static int read_answer(struct client *one)
{
    static char bytes[READ_BYTES];
    ssize_t got = recv(one->fd, bytes, sizeof bytes, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    int understood = got > 0 ? take(one, bytes, got, now_ns()) : -1;
    if (understood == 0 && one->state != WHOLE)
        return 0;
    if (understood == 0 && one->tokens == wanted_tokens && one->done) {
        count_whole(one);
        return 1;
    }
    count_lost(one, got <= 0 ? "the connection ended" : "the answer ended");
    close(one->fd);
    one->fd = -1;
    return 1;
}

/* ---- the run */

static int by_size(const void *one, const void *other)
{
    int64_t a = *(const int64_t *)one, b = *(const int64_t *)other;
    return (a > b) - (a < b);
}

static void print_times(const char *name, struct times *of)
{
    qsort(of->ns, of->count, sizeof *of->ns, by_size);
    printf("\"%s\":{\"count\":%zu", name, of->count);
    static const struct { const char *name; double share; } wanted[] = {{"p50", .50}, {"p95", .95}, {"p99", .99}, {"max", 1}};
    for (size_t at = 0; at < sizeof wanted / sizeof *wanted; at++) {
        size_t place = of->count ? (size_t)((of->count - 1) * wanted[at].share) : 0;
        printf(",\"%s_ms\":%.4f", wanted[at].name, of->count ? of->ns[place] / 1e6 : 0.0);
    }
    printf("}");
}

static void print_result(int64_t took_ns)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    printf("{\"seconds\":%.4f,\"cpu_s\":%.4f,\"whole\":%ld,\"lost\":%ld,\"tokens\":%ld,\"connects\":%ld,\"problem\":\"%s\",",
           took_ns / 1e9, used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6,
           whole, lost, tokens_of_whole, connects, problem);
    print_times("first_token", &firsts);
    printf(",");
    print_times("gap", &gaps);
    printf("}\n");
}

static int more_to_ask(const struct client *all, int clients, int asked)
{
    if (!once || asked < clients)
        return 1;
    for (int at = 0; at < clients; at++)
        if (all[at].asked_ns && all[at].fd >= 0)
            return 1;
    return 0;
}

static int64_t run(struct client *all, int clients, int64_t limit_ns)
{
    struct epoll_event events[EVENTS];
    int64_t start = now_ns();
    int asked = 0;
    while (now_ns() - start < limit_ns && more_to_ask(all, clients, asked)) {
        int64_t due = once ? (now_ns() - start) * clients / SPREAD_NS + 1 : clients;
        while (asked < clients && asked < due)
            ask(&all[asked++]);
        int ready = epoll_wait(epoll_fd, events, EVENTS, asked < clients ? 1 : 20);
        for (int at = 0; at < ready; at++) {
            struct client *one = events[at].data.ptr;
            if (!read_answer(one))
                continue;
            if (once) {
                if (one->fd >= 0)
                    close(one->fd);
                one->fd = -1;
                continue;
            }
            if (one->fd < 0)
                connect_to(one);
            ask(one);
        }
    }
    for (int at = 0; once && at < clients; at++)
        if (all[at].fd >= 0)
            count_lost(&all[at], "no more time");
    return now_ns() - start;
}

int main(int count, char **words)
{
    int clients = 1;
    double seconds = 5;
    struct rlimit files;
    if (count < 2) {
        fprintf(stderr, "usage: clients PORT --clients N --tokens N --seconds S [--once] < REQUEST\n");
        return 2;
    }
    port = atoi(words[1]);
    for (int at = 2; at < count; at++) {
        const char *value = at + 1 < count ? words[at + 1] : "0";
        if (!strcmp(words[at], "--clients"))
            clients = atoi(value);
        if (!strcmp(words[at], "--tokens"))
            wanted_tokens = atoi(value);
        if (!strcmp(words[at], "--seconds"))
            seconds = atof(value);
        if (!strcmp(words[at], "--once"))
            once = 1;
    }
    request_length = fread(request, 1, sizeof request, stdin);
    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct client *all = calloc(clients, sizeof *all);
    if (epoll_fd < 0 || !all)
        die("start");
    for (int at = 0; at < clients; at++) {
        all[at].gaps = malloc(wanted_tokens * sizeof *all[at].gaps);
        if (!all[at].gaps)
            die("memory");
        connect_to(&all[at]);
    }
    print_result(run(all, clients, (int64_t)(seconds * 1e9)));
    return 0;
}
