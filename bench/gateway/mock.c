/* An OpenAI-compatible server without a model that costs as little as possible, as the upstream of what is measured.
 *
 *   cc -O2 -o mock mock.c && ./mock PORT [--tokens N] [--rate N] [--work N]
 *
 * It answers GET /v1/models and POST /v1/chat/completions on 127.0.0.1, whole or as a stream, over connections that
 * stay open. PORT 0 takes a free port; the line "listening on PORT" says which. --tokens: how many each answer has (64).
 * --rate: how many tokens a second each stream gets (0: all at once). --work: how many µs of CPU time it wastes on each
 * request (0), to stand for a server that does more.
 *
 * A token is one server-sent event, one HTTP chunk and one write(), as engines send it. All answers are the same bytes,
 * made once at the start, so that a connection needs no more than its place in them.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
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

enum { REQUEST_BYTES = 64 * 1024, EVENT_BYTES = 1024, EVENTS = 512 };

#define ID "chatcmpl-7f3a90c2e15b4d6890ab12cd34ef5678"
#define CHUNK_HEAD "{\"id\":\"" ID "\",\"object\":\"chat.completion.chunk\",\"created\":1763700000," \
                   "\"model\":\"mock\",\"system_fingerprint\":\"fp_44709d6fcb\",\"choices\":"

struct piece { /* what one write() sends */
    char *bytes;
    size_t length;
};

struct answer { /* the bytes of a response; pieces from `paced` up to `unpaced` wait for their time */
    struct piece *pieces;
    int count, paced, unpaced;
};

struct connection {
    int fd;
    const struct answer *answer; /* NULL between requests */
    int piece;
    size_t sent; /* of that piece */
    int blocked; /* the socket takes no more */
    int64_t due_ns;
    struct connection *earlier, *later; /* in the queue of paced streams; `queued` says whether it is there */
    int queued;
    size_t held;
    char request[REQUEST_BYTES];
};

static struct answer models, whole, stream, stream_without_usage, unknown, bad;
static int epoll_fd;
static int64_t interval_ns, work_ns;
static struct connection *first, *last; /* by due_ns: all streams have the same interval, so new times go to the end */

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

/* ---- the answers */

static void add(struct answer *to, const char *format, ...)
{
    va_list values;
    struct piece *piece;
    to->pieces = realloc(to->pieces, (to->count + 1) * sizeof *to->pieces);
    if (!to->pieces)
        die("memory");
    piece = &to->pieces[to->count++];
    va_start(values, format);
    int length = vasprintf(&piece->bytes, format, values);
    va_end(values);
    if (length < 0)
        die("memory");
    piece->length = length;
}

static void add_event(struct answer *to, const char *data)
{
    add(to, "%zx\r\ndata: %s\n\n\r\n", strlen(data) + 8, data);
}

static void add_json(struct answer *to, const char *status, const char *body)
{
    add(to, "HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s", status, strlen(body), body);
}

static const char *word(int number)
{
    static const char *words[] = {" bees", " gather", " nectar", " from", " flowers", " and", " carry", " it", " home,"};
    return words[number % (sizeof words / sizeof *words)];
}

static void make_stream(struct answer *to, int tokens, int with_usage)
{
    char data[EVENT_BYTES];
    add(to, "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
            "transfer-encoding: chunked\r\n\r\n");
    for (int token = 0; token < tokens; token++) {
        snprintf(data, sizeof data, CHUNK_HEAD "[{\"index\":0,\"delta\":{%s\"content\":\"%s\"},\"logprobs\":null,"
                 "\"finish_reason\":%s}]}", token ? "" : "\"role\":\"assistant\",", word(token),
                 token + 1 < tokens ? "null" : "\"length\"");
        add_event(to, data);
    }
    to->paced = 2; /* the head and the first token go at once; what follows the last token, too */
    to->unpaced = to->count;
    if (with_usage) {
        snprintf(data, sizeof data, CHUNK_HEAD "[],\"usage\":{\"prompt_tokens\":24,\"completion_tokens\":%d,"
                 "\"total_tokens\":%d}}", tokens, tokens + 24);
        add_event(to, data);
    }
    add_event(to, "[DONE]");
    add(to, "0\r\n\r\n");
}

static void make_whole(struct answer *to, int tokens)
{
    char *body = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&body, &length);
    if (!out)
        die("memory");
    fputs("{\"id\":\"" ID "\",\"object\":\"chat.completion\",\"created\":1763700000,\"model\":\"mock\",\"choices\":[{"
          "\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"", out);
    for (int token = 0; token < tokens; token++)
        fputs(word(token), out);
    fprintf(out, "\",\"refusal\":null},\"logprobs\":null,\"finish_reason\":\"length\"}],\"usage\":{\"prompt_tokens\":24,"
            "\"completion_tokens\":%d,\"total_tokens\":%d},\"system_fingerprint\":\"fp_44709d6fcb\"}", tokens, tokens + 24);
    fclose(out);
    add_json(to, "200 OK", body);
    free(body);
}

static void make_answers(int tokens)
{
    add_json(&models, "200 OK", "{\"object\":\"list\",\"data\":[{\"id\":\"mock\",\"object\":\"model\","
             "\"created\":1763700000,\"owned_by\":\"bench\"}]}");
    add_json(&unknown, "404 Not Found", "{\"error\":{\"message\":\"there is GET /v1/models and POST "
             "/v1/chat/completions\",\"type\":\"invalid_request_error\",\"code\":\"not_found\"}}");
    add_json(&bad, "400 Bad Request", "{\"error\":{\"message\":\"a request needs a Content-Length and at most 64 KiB\","
             "\"type\":\"invalid_request_error\",\"code\":\"bad_request\"}}");
    make_whole(&whole, tokens);
    make_stream(&stream, tokens, 1);
    make_stream(&stream_without_usage, tokens, 0);
}

/* ---- the queue of streams that wait for the time of their next token */

static void unqueue(struct connection *one)
{
    if (!one->queued)
        return;
    *(one->earlier ? &one->earlier->later : &first) = one->later;
    *(one->later ? &one->later->earlier : &last) = one->earlier;
    one->queued = 0;
}

static void queue(struct connection *one)
{
    unqueue(one);
    one->earlier = last;
    one->later = NULL;
    *(last ? &last->later : &first) = one;
    last = one;
    one->queued = 1;
}

/* ---- connections */

static void watch(struct connection *one, int how)
{
    struct epoll_event event = {.events = EPOLLIN | (one->blocked ? EPOLLOUT : 0), .data.ptr = one};
    if (epoll_ctl(epoll_fd, how, one->fd, &event) < 0)
        die("epoll_ctl");
}

static void leave(struct connection *one)
{
    unqueue(one);
    close(one->fd);
    free(one);
}

/* Send the current piece. Returns 1 when it is gone, 0 when the socket is full, -1 when the client has left. */
static int send_piece(struct connection *one)
{
    const struct piece *piece = &one->answer->pieces[one->piece];
    while (one->sent < piece->length) {
        ssize_t sent = write(one->fd, piece->bytes + one->sent, piece->length - one->sent);
        if (sent >= 0) {
            one->sent += sent;
        } else if (errno == EAGAIN) {
            if (!one->blocked) {
                one->blocked = 1;
                watch(one, EPOLL_CTL_MOD);
            }
            return 0;
        } else if (errno != EINTR) {
            return -1;
        }
    }
    if (one->blocked) {
        one->blocked = 0;
        watch(one, EPOLL_CTL_MOD);
    }
    one->sent = 0;
    one->piece++;
    return 1;
}

/* Send what is due of an answer. Returns -1 when the client has left. */
static int go_on(struct connection *one)
{
    while (one->answer) {
        int paced = interval_ns && one->piece >= one->answer->paced && one->piece < one->answer->unpaced;
        if (paced && !one->sent && one->due_ns > now_ns()) {
            queue(one);
            return 0;
        }
        int done = send_piece(one);
        if (done <= 0)
            return done;
        if (one->piece == one->answer->count)
            one->answer = NULL;
        else if (paced)
            one->due_ns += interval_ns;
    }
    return 0;
}

static int asks_for(const char *body, size_t length, const char *name)
{
    const char *found = memmem(body, length, name, strlen(name));
    if (!found)
        return 0;
    found += strlen(name);
    while (found < body + length && (*found == ' ' || *found == ':'))
        found++;
    return found + 4 <= body + length && !memcmp(found, "true", 4);
}

/* Return the answer to the request at the start of what is held, and how long that request is; NULL: not all is here. */
static const struct answer *understood(struct connection *one, size_t *length)
{
    char *end = memmem(one->request, one->held, "\r\n\r\n", 4), *body, *line;
    long body_length = 0;
    if (!end)
        return one->held < REQUEST_BYTES ? NULL : &bad;
    body = end + 4;
    for (line = memchr(one->request, '\n', end - one->request); line; line = memchr(line + 1, '\n', end - line - 1)) {
        if (!strncasecmp(line + 1, "content-length:", 15))
            body_length = strtol(line + 16, NULL, 10);
        if (!strncasecmp(line + 1, "transfer-encoding:", 18))
            return &bad;
    }
    *length = body - one->request + body_length;
    if (body_length < 0 || *length > REQUEST_BYTES)
        return &bad;
    if (*length > one->held)
        return NULL;
    if (!memcmp(one->request, "GET /v1/models ", 15))
        return &models;
    if (memcmp(one->request, "POST /v1/chat/completions ", 26))
        return &unknown;
    if (!asks_for(body, body_length, "\"stream\""))
        return &whole;
    return asks_for(body, body_length, "\"include_usage\"") ? &stream : &stream_without_usage;
}

static void work(void)
{
    int64_t end = work_ns ? now_ns() + work_ns : 0;
    while (end && now_ns() < end)
        ;
}

/* Begin as many answers as there are whole requests, one after the other. Returns -1 when the connection is to end. */
static int answer_requests(struct connection *one)
{
    while (!one->answer) {
        size_t length = 0;
        const struct answer *answer = understood(one, &length);
        if (!answer)
            return 0;
        work();
        one->answer = answer;
        one->piece = 0;
        one->sent = 0;
        one->due_ns = interval_ns ? now_ns() + interval_ns : 0;
        if (answer == &bad) {
            go_on(one);
            return -1;
        }
        one->held -= length;
        memmove(one->request, one->request + length, one->held);
        if (go_on(one) < 0)
            return -1;
    }
    return 0;
}

static int read_more(struct connection *one)
{
    if (one->held == REQUEST_BYTES)
        return -1; /* more requests in advance than fit */
    ssize_t got = read(one->fd, one->request + one->held, REQUEST_BYTES - one->held);
    if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR))
        return -1;
    one->held += got > 0 ? got : 0;
    return 0;
}

static void serve(struct connection *one, uint32_t events)
{
    if (events & EPOLLOUT && go_on(one) < 0) {
        leave(one);
        return;
    }
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR) && read_more(one) < 0) {
        leave(one);
        return;
    }
    if (answer_requests(one) < 0)
        leave(one);
}

static void take(int listener)
{
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
        struct connection *one = malloc(sizeof *one);
        if (!one)
            die("memory");
        memset(one, 0, offsetof(struct connection, request));
        one->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
        watch(one, EPOLL_CTL_ADD);
    }
}

/* Send the tokens that are due. Returns how many ms there are until the next; -1: none waits. */
static int send_due(void)
{
    while (first) {
        struct connection *one = first;
        int64_t left_ns = one->due_ns - now_ns();
        if (left_ns > 0)
            return (int)((left_ns + 999999) / 1000000);
        unqueue(one);
        if (go_on(one) < 0 || (!one->answer && answer_requests(one) < 0))
            leave(one);
    }
    return -1;
}

static int listening_on(int port)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof at;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int)) < 0)
        die("socket");
    if (bind(fd, (struct sockaddr *)&at, sizeof at) < 0 || listen(fd, 4096) < 0)
        die("listen");
    getsockname(fd, (struct sockaddr *)&at, &size);
    printf("listening on %d\n", ntohs(at.sin_port));
    fflush(stdout);
    return fd;
}

static long option(int count, char **words, const char *name, long otherwise)
{
    for (int at = 2; at + 1 < count; at++)
        if (!strcmp(words[at], name))
            return strtol(words[at + 1], NULL, 10);
    return otherwise;
}

int main(int count, char **words)
{
    struct rlimit files;
    struct epoll_event events[EVENTS];
    if (count < 2) {
        fprintf(stderr, "usage: mock PORT [--tokens N] [--rate N] [--work N]\n");
        return 2;
    }
    long tokens = option(count, words, "--tokens", 64), rate = option(count, words, "--rate", 0);
    interval_ns = rate > 0 ? 1000000000 / rate : 0;
    work_ns = 1000 * option(count, words, "--work", 0);
    make_answers(tokens > 0 ? tokens : 1);
    signal(SIGPIPE, SIG_IGN);
    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    int listener = listening_on(atoi(words[1]));
    struct epoll_event listening = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_fd < 0 || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &listening) < 0)
        die("epoll");
    for (;;) {
        int wait_ms = send_due();
        int ready = epoll_wait(epoll_fd, events, EVENTS, wait_ms);
        for (int at = 0; at < ready; at++) {
            if (events[at].data.ptr)
                serve(events[at].data.ptr, events[at].events);
            else
                take(listener);
        }
    }
}
