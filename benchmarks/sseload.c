/* sseload: puts a load of event streams on one server, and measures what that costs.
 *
 *     cc -std=c11 -O2 -o sseload sseload.c
 *     ./sseload --port 8000 --listen /events/poll/t%d --publish /events/ping/t%d \
 *         --tokens 10 --listeners 500 --events 200 --rate 50 --pid 4242
 *
 * One thread and one epoll instance hold all connections. A run has these phases; `--timeout`
 * ends it in any of them:
 *
 *   1. Opening. N streams are asked for, a few at once. A stream is open when the head of its
 *      answer, with status 200, is complete.
 *   2. Rest, for `--idle`; then the server's memory is read.
 *   3. Load: events are published by POST on connections of their own (`--publish`), or are
 *      waited for (`--expect`), or only `--stay` passes.
 *   4. `--stay`: the streams are held open. What they receive after a load is not counted.
 *
 * How it measures:
 *
 *   - The payload begins with a marker, `T<nanoseconds of CLOCK_REALTIME>.`, written just before
 *     it is sent. A line of a stream that begins with `data:` and holds a marker is a delivery,
 *     and the time between is its latency. The time of arrival is taken once per read, before
 *     the bytes are looked at. With `--expect` every event that a browser would dispatch is a
 *     delivery instead, and there is no latency.
 *   - Every stream has a goal: the publications to its token that were answered with 2xx, or
 *     `--expect`. What streams lack of it is `lost`; what they have above it is `extra`. Both
 *     are summed stream by stream, so that one does not hide the other.
 *   - Publications are due at fixed times, counted from the first one. Whoever is late does not
 *     shift those after it; `late_ms` is the worst. A large one says that the server's answers,
 *     or this program, did not keep up with the rate.
 *   - The server's CPU time is that of its processes' own clocks, which count threads that have
 *     ended and are exact to the scheduler's tick. Where these cannot be read it is utime + stime
 *     of /proc/PID/stat, in hundredths of a second; `cpu_clock` says which.
 *   - The server's instructions, those of the kernel for it included, are what the processor
 *     has counted in all threads of its processes. Unlike time they do not depend on what else
 *     the machine does. Where the kernel or the machine does not count them, they are null.
 *   - CPU time that this program takes is missing to a server on the same cores:
 *     `own_cpu_seconds` says how much that was in the load.
 *
 * The result is one JSON object on stdout. What was not measured is null.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <linux/perf_event.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

/* The tests make these small, so that reads are cut everywhere and samples are thinned out. */
#ifndef READ_BYTES
#define READ_BYTES (256 * 1024)
#endif
#ifndef MAX_SAMPLES
#define MAX_SAMPLES 5000000 /* even */
#endif

enum {
    USAGE = 2,             /* exit status */
    BATCH = 64,            /* connections looked at before the schedule is, again */
    MARKER_DIGITS = 19,    /* nanoseconds since 1970, from 2001 to 2286 */
    MARKER_BYTES = MARKER_DIGITS + 2,
    HEAD_LINE_BYTES = 256, /* what is kept of a line of a head; no line of interest is longer */
    MAX_HEAD_BYTES = 65536,
    MAX_PIDS = 64,
    SPARE_FDS = 16,
};
static const double RETRY_SECONDS = 0.05; /* before a publisher that was refused comes again */

/* ---- Small things --------------------------------------------------------------------- */

__attribute__((noreturn, format(printf, 2, 3)))
static void die(int status, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    fputs("sseload: ", stderr);
    vfprintf(stderr, format, values);
    fputc('\n', stderr);
    va_end(values);
    exit(status);
}

static double seconds_of(clockid_t clock)
{
    struct timespec t;
    if (clock_gettime(clock, &t) < 0)
        return NAN;
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static double now(void)
{
    return seconds_of(CLOCK_MONOTONIC);
}

static uint64_t wall_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static double earlier(double a, double b)
{
    return a < b ? a : b;
}

static double later(double a, double b)
{
    return a > b ? a : b;
}

static bool in_range(int value, int least, int most)
{
    return value >= least && value <= most;
}

static void *grown(void *memory, size_t count, size_t size)
{
    void *more = reallocarray(memory, count, size);
    if (more == NULL && count > 0)
        die(1, "out of memory");
    return more;
}

/* Bytes that grow at their end. */
struct text {
    char *data;
    size_t length, capacity;
};

static char *text_room(struct text *text, size_t more)
{
    if (text->length + more > text->capacity) {
        text->capacity = 2 * text->capacity + more;
        text->data = grown(text->data, text->capacity, 1);
    }
    return text->data + text->length;
}

__attribute__((format(printf, 2, 3)))
static void text_add(struct text *text, const char *format, ...)
{
    va_list values, again;
    va_start(values, format);
    va_copy(again, values);
    int length = vsnprintf(NULL, 0, format, values);
    vsnprintf(text_room(text, (size_t)length + 1), (size_t)length + 1, format, again);
    text->length += (size_t)length;
    va_end(again);
    va_end(values);
}

static void text_fill(struct text *text, char byte, size_t count)
{
    memset(text_room(text, count), byte, count);
    text->length += count;
}

/* Add a path, with a number in each place of "%d". */
static void text_add_path(struct text *text, const char *pattern, long number)
{
    const char *place;
    while ((place = strstr(pattern, "%d")) != NULL) {
        text_add(text, "%.*s%ld", (int)(place - pattern), pattern, number);
        pattern = place + 2;
    }
    text_add(text, "%s", pattern);
}

static void text_append(struct text *text, const struct text *other)
{
    if (other->length > 0)
        memcpy(text_room(text, other->length), other->data, other->length);
    text->length += other->length;
}

static void text_free(struct text *text)
{
    free(text->data);
    *text = (struct text){0};
}

/* ---- Samples: at most MAX_SAMPLES of them, evenly spread over all that were taken ----- */

struct samples {
    float *values;
    size_t length, capacity;
    uint64_t seen, stride; /* every stride-th is kept */
    float most;            /* of all, kept or not */
};

static void samples_thin_out(struct samples *samples)
{
    samples->length /= 2;
    for (size_t i = 0; i < samples->length; i++)
        samples->values[i] = samples->values[2 * i];
    samples->stride *= 2;
}

static void samples_add(struct samples *samples, float value)
{
    if (samples->seen == 0 || value > samples->most)
        samples->most = value;
    if (samples->stride == 0)
        samples->stride = 1;
    if (samples->seen++ % samples->stride != 0)
        return;
    if (samples->length == samples->capacity && samples->capacity < MAX_SAMPLES) {
        size_t capacity = samples->capacity == 0 ? 1024 : 2 * samples->capacity;
        samples->capacity = capacity < MAX_SAMPLES ? capacity : MAX_SAMPLES;
        samples->values = grown(samples->values, samples->capacity, sizeof *samples->values);
    }
    /* MAX_SAMPLES is even: what comes now is still a multiple of the doubled stride. */
    if (samples->length == MAX_SAMPLES)
        samples_thin_out(samples);
    samples->values[samples->length++] = value;
}

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Give the smallest value that so many percent are not above, of sorted samples. */
static double percentile(const struct samples *samples, unsigned percent)
{
    size_t rank = (samples->length * percent + 99) / 100;
    return samples->values[rank == 0 ? 0 : rank - 1];
}

/* ---- Options -------------------------------------------------------------------------- */

static struct {
    const char *host, *listen, *publish, *content_type;
    long port, listeners, tokens, events, publishers, size, expect, at_once;
    double rate, idle, stay, quiet, timeout;
    struct text headers, listen_headers; /* "Name: value\r\n", again and again */
    pid_t pids[MAX_PIDS];
    int pid_count;
} options = {
    .host = "127.0.0.1",
    .content_type = "text/plain; charset=utf-8",
    .listeners = 1,
    .tokens = 1,
    .events = 1,
    .publishers = 1,
    .size = 64,
    .at_once = 64,
    .quiet = 3,
    .timeout = 60,
};

enum kind { TEXT, PATH, COUNT, DECIMAL, HEADER, PID, HELP };

static const struct spec {
    const char *name;
    enum kind kind;
    void *target;
    double least, most; /* of a number */
    const char *help;
} specs[] = {
    {"host", TEXT, &options.host, 0, 0, "the server's name or address (127.0.0.1)"},
    {"port", COUNT, &options.port, 1, 65535, "its port; needed"},
    {"listen", PATH, &options.listen, 0, 0, "path of a stream; %d: its number modulo --tokens"},
    {"listeners", COUNT, &options.listeners, 0, 1e6, "how many streams (1)"},
    {"tokens", COUNT, &options.tokens, 1, 1e6, "spread streams and publications over so many (1)"},
    {"header", HEADER, &options.headers, 0, 0, "'Name: value' of every request; repeatable"},
    {"listen-header", HEADER, &options.listen_headers, 0, 0, "the same, of streams only"},
    {"publish", PATH, &options.publish, 0, 0, "path to POST to; %d: as above, of publications"},
    {"events", COUNT, &options.events, 1, 1e9, "how many publications (1)"},
    {"rate", DECIMAL, &options.rate, 0, 1e6, "of them per second; 0: as fast as answers come (0)"},
    {"publishers", COUNT, &options.publishers, 1, 1e4, "connections that publish (1)"},
    {"size", COUNT, &options.size, MARKER_BYTES, 1e8, "bytes of a payload (64)"},
    {"content-type", TEXT, &options.content_type, 0, 0, "of publications (text/plain)"},
    {"expect", COUNT, &options.expect, 1, 1e9, "events that every stream is to replay by itself"},
    {"idle", DECIMAL, &options.idle, 0, 1e6, "seconds between opening and reading memory (0)"},
    {"stay", DECIMAL, &options.stay, 0, 1e6, "seconds to hold the streams open at the end (0)"},
    {"pid", PID, NULL, 1, 1e9, "process of the server to measure; repeatable"},
    {"at-once", COUNT, &options.at_once, 1, 1e6, "streams being opened at a time (64)"},
    {"quiet-seconds", DECIMAL, &options.quiet, 0, 1e6, "without a delivery that end it (3)"},
    {"timeout", DECIMAL, &options.timeout, 0, 1e6, "seconds after which it ends anyway (60)"},
    {"help", HELP, NULL, 0, 0, "print this"},
};
enum { SPEC_COUNT = sizeof specs / sizeof *specs };

static void print_help(void)
{
    puts("usage: sseload --port PORT [--listen PATH] [--publish PATH | --expect K] [...]\n");
    for (int i = 0; i < SPEC_COUNT; i++)
        printf("  --%-14s %s\n", specs[i].name, specs[i].help);
}

static double number_from(const struct spec *spec, const char *value)
{
    char *end;
    double number = strtod(value, &end);
    bool valid = end > value && *end == '\0' && number >= spec->least && number <= spec->most;
    if (spec->kind != DECIMAL && value[strspn(value, "0123456789")] != '\0')
        valid = false;
    if (!valid)
        die(USAGE, "--%s: a%s number from %.0f to %.0f, not '%s'", spec->name,
            spec->kind == DECIMAL ? "" : " whole", spec->least, spec->most, value);
    return number;
}

/* A request is lines: what would end one of them is no part of an option. */
static void check_text(const struct spec *spec, const char *value)
{
    bool is_path = spec->kind == PATH;
    for (const char *c = value; *c; c++)
        if (*c == '\r' || *c == '\n' || (is_path && isspace((unsigned char)*c)))
            die(USAGE, "--%s: %s", spec->name, is_path ? "no white space" : "no line ends");
    if (is_path && value[0] != '/')
        die(USAGE, "--%s: a path begins with '/', unlike '%s'", spec->name, value);
    if (spec->kind == HEADER && (value[0] == ':' || strchr(value, ':') == NULL))
        die(USAGE, "--%s: 'Name: value', not '%s'", spec->name, value);
}

static void take_option(const struct spec *spec, const char *value)
{
    switch (spec->kind) {
    case TEXT:
    case PATH:
        check_text(spec, value);
        *(const char **)spec->target = value;
        break;
    case HEADER:
        check_text(spec, value);
        text_add(spec->target, "%s\r\n", value);
        break;
    case COUNT:
        *(long *)spec->target = (long)number_from(spec, value);
        break;
    case DECIMAL:
        *(double *)spec->target = number_from(spec, value);
        break;
    case PID:
        if (options.pid_count == MAX_PIDS)
            die(USAGE, "--pid: at most %d of them", MAX_PIDS);
        options.pids[options.pid_count++] = (pid_t)number_from(spec, value);
        break;
    case HELP:
        print_help();
        exit(0);
    }
}

static void check_options(void)
{
    if (options.port == 0)
        die(USAGE, "--port is needed");
    if (options.listen == NULL)
        options.listeners = 0;
    if (options.listeners == 0 && options.publish == NULL)
        die(USAGE, "nothing to do: --listen or --publish is needed");
    if (options.expect > 0 && options.publish != NULL)
        die(USAGE, "--expect counts what others published: it does not go with --publish");
    if (options.expect > 0 && options.listeners == 0)
        die(USAGE, "--expect needs --listen");
    const char *paths[] = {options.listeners > 0 ? options.listen : NULL, options.publish};
    for (int i = 0; i < 2 && options.tokens > 1; i++)
        if (paths[i] != NULL && strstr(paths[i], "%d") == NULL)
            die(USAGE, "--tokens needs a %%d in the path '%s'", paths[i]);
    for (int i = 0; i < options.pid_count; i++)
        if (kill(options.pids[i], 0) < 0 && errno == ESRCH)
            die(USAGE, "--pid: no process %d", (int)options.pids[i]);
}

static void read_options(int argc, char **argv)
{
    struct option longs[SPEC_COUNT + 1] = {{0}};
    for (int i = 0; i < SPEC_COUNT; i++) {
        longs[i].name = specs[i].name;
        longs[i].has_arg = specs[i].kind == HELP ? no_argument : required_argument;
    }
    int index, got;
    while ((got = getopt_long(argc, argv, "", longs, &index)) != -1) {
        if (got != 0)
            exit(USAGE); /* getopt has said why */
        take_option(&specs[index], optarg);
    }
    if (optind < argc)
        die(USAGE, "'%s' is no option", argv[optind]);
    check_options();
}

/* ---- The server's processes ----------------------------------------------------------- */

static bool cpu_by_clock = true;
static double cpu_last[MAX_PIDS];
static int pids_gone;

static double cpu_of_clock(pid_t pid)
{
    clockid_t clock;
    return clock_getcpuclockid(pid, &clock) == 0 ? seconds_of(clock) : NAN;
}

static FILE *open_proc(pid_t pid, const char *name)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    return fopen(path, "re");
}

static double cpu_of_stat(pid_t pid)
{
    FILE *file = open_proc(pid, "stat");
    if (file == NULL)
        return NAN;
    char line[1024];
    size_t length = fread(line, 1, sizeof line - 1, file);
    fclose(file);
    line[length] = '\0';
    /* The second field is the command in parentheses, and may hold spaces and parentheses. */
    char *rest = strrchr(line, ')');
    unsigned long user, system;
    if (rest == NULL || sscanf(rest + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu",
                               &user, &system) != 2)
        return NAN;
    return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

static void choose_cpu_clock(void)
{
#ifdef NO_CPU_CLOCK
    cpu_by_clock = false;
#endif
    for (int i = 0; i < options.pid_count; i++)
        if (isnan(cpu_of_clock(options.pids[i])))
            cpu_by_clock = false;
}

/* Give the CPU seconds of all processes. One that is gone keeps what it had. */
static double cpu_seconds(void)
{
    double sum = 0;
    pids_gone = 0;
    for (int i = 0; i < options.pid_count; i++) {
        double cpu = cpu_by_clock ? cpu_of_clock(options.pids[i]) : cpu_of_stat(options.pids[i]);
        if (isnan(cpu))
            pids_gone++;
        else
            cpu_last[i] = cpu;
        sum += cpu_last[i];
    }
    return options.pid_count > 0 ? sum : NAN;
}

enum { MAX_COUNTERS = 4096 };
static int counters[MAX_COUNTERS];
static int counter_count;

/* Count the instructions of a thread, and of the threads and processes that it will start. */
static int count_instructions_of(pid_t tid)
{
#ifdef NO_INSTRUCTIONS
    tid = -2; /* no thread: as on a machine that does not count */
#endif
    struct perf_event_attr attr = {
        .type = PERF_TYPE_HARDWARE,
        .size = sizeof attr,
        .config = PERF_COUNT_HW_INSTRUCTIONS,
        .inherit = 1,
        .exclude_hv = 1,
    };
    return (int)syscall(SYS_perf_event_open, &attr, tid, -1, -1, PERF_FLAG_FD_CLOEXEC);
}

static void close_counters(void)
{
    while (counter_count > 0)
        close(counters[--counter_count]);
}

/* Begin to count instructions in all threads; or in none, where one cannot be counted. */
static void open_counters(void)
{
    for (int i = 0; i < options.pid_count; i++) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/task", (int)options.pids[i]);
        DIR *threads = opendir(path);
        struct dirent *entry;
        while (threads != NULL && (entry = readdir(threads)) != NULL) {
            if (!isdigit((unsigned char)entry->d_name[0]))
                continue;
            int fd = counter_count < MAX_COUNTERS
                         ? count_instructions_of((pid_t)atoi(entry->d_name))
                         : -1;
            if (fd < 0 && errno == ESRCH && counter_count < MAX_COUNTERS)
                continue; /* it has ended */
            if (fd < 0) {
                closedir(threads);
                close_counters();
                return;
            }
            counters[counter_count++] = fd;
        }
        if (threads != NULL)
            closedir(threads);
    }
}

/* Give the instructions since the counters were opened. */
static double instructions(void)
{
    double sum = counter_count > 0 ? 0 : NAN;
    for (int i = 0; i < counter_count; i++) {
        uint64_t count;
        sum += read(counters[i], &count, sizeof count) == sizeof count ? (double)count : NAN;
    }
    return sum;
}

/* Give the number after a name at the beginning of a line of a file of /proc. */
static double proc_field(pid_t pid, const char *name, const char *field)
{
    FILE *file = open_proc(pid, name);
    char line[256];
    double value = NAN;
    while (file != NULL && isnan(value) && fgets(line, sizeof line, file) != NULL)
        if (strncmp(line, field, strlen(field)) == 0)
            value = strtod(line + strlen(field), NULL);
    if (file != NULL)
        fclose(file);
    return value;
}

static double open_fds(pid_t pid)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
    DIR *directory = opendir(path);
    if (directory == NULL)
        return NAN;
    double count = 0;
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;)
        count += entry->d_name[0] != '.';
    closedir(directory);
    return count;
}

struct footprint {
    double rss_kib, pss_kib, threads, fds; /* NaN where it cannot be read */
};

static struct footprint footprint_of(pid_t pid)
{
    struct footprint one = {
        .rss_kib = proc_field(pid, "smaps_rollup", "Rss:"),
        .pss_kib = proc_field(pid, "smaps_rollup", "Pss:"),
        .threads = proc_field(pid, "status", "Threads:"),
        .fds = open_fds(pid),
    };
    /* The second choice: the kernel may keep this one only roughly, per CPU. */
    if (isnan(one.rss_kib))
        one.rss_kib = proc_field(pid, "status", "VmRSS:");
    return one;
}

static struct footprint footprint(void)
{
    if (options.pid_count == 0)
        return (struct footprint){NAN, NAN, NAN, NAN};
    struct footprint sum = {0};
    for (int i = 0; i < options.pid_count; i++) {
        struct footprint one = footprint_of(options.pids[i]);
        sum.rss_kib += one.rss_kib;
        sum.pss_kib += one.pss_kib;
        sum.threads += one.threads;
        sum.fds += one.fds;
    }
    return sum;
}

/* ---- Connections ---------------------------------------------------------------------- */

enum part {
    /* of the head */
    STATUS_LINE,
    HEADERS,
    /* around the chunks */
    CHUNK_SIZE,
    CHUNK_END,
    TRAILERS,
    /* of the body itself */
    CHUNK_DATA,
    BY_LENGTH,
    UNTIL_CLOSE,
    /* beyond it */
    COMPLETE,
    MALFORMED,
};

/* An HTTP/1.x answer, as far as it has come. */
struct answer {
    enum part part;
    int status;
    bool chunked, has_length, closing;
    uint64_t left; /* of the body or of the chunk */
    unsigned head_bytes, line_length;
    char line[HEAD_LINE_BYTES];
};

/* The lines of a stream, as far as they have come. */
struct lines {
    bool after_cr;   /* an LF that comes now belongs to the line end before it */
    bool has_data;   /* the block has a data line */
    int matched;     /* bytes of "data:" that the line begins with, or OTHER_LINE */
    int digits;      /* of a marker, so far; -1: there was no T */
    uint64_t number; /* what these digits say */
    uint64_t marker; /* of this line; 0: none */
};
enum { DATA = 5, OTHER_LINE = 6 };

enum stream_state { NEW, OPENING, OPEN, OVER };

struct connection {
    int fd;
    bool publisher, connected;
    uint32_t watched; /* what epoll is to tell of it */
    long number;
    struct text out; /* a request, up to out.length, of which `sent` are away */
    size_t sent;
    struct answer answer;
    /* of a listener */
    enum stream_state state;
    bool opened; /* it was open, ever */
    struct lines lines;
    uint64_t events;
    /* of a publisher */
    bool busy, served; /* served: a publication was answered on this connection */
    long token;
    double began, retry_at;
};

static struct connection *listeners, *publishers;
static struct addrinfo *address;
static int poller, timer;
static double stop_at;
static bool reached; /* a connection was made, ever */

static struct {
    long being_opened, opened, connect_failed, closed_early, malformed, first_bad_status;
    double open_seconds, open_cpu;
    struct footprint before, after;
    long published, in_flight, publish_ok, publish_failed;
    uint64_t delivered, bytes;
    double began, cpu_began, own_cpu_began, late; /* of the load */
    double last_delivery, last_answer;
    double cpu, own_cpu, seconds, instructions, open_instructions;
    bool counting, timed_out;
    long statuses[1000], publish_statuses[1000];
    struct samples latency, publish_latency;
} result = {.counting = true};

/* What streams are to receive is known from the beginning with --expect, and when all publications
 * are answered otherwise. From then on, `waiting` streams lack some and may still receive it. */
static struct {
    bool known;
    long waiting;
    double since;
    uint64_t *published; /* per token, with success */
} goals;

static uint64_t goal(const struct connection *c)
{
    if (options.expect > 0)
        return (uint64_t)options.expect;
    return goals.published[c->number % options.tokens];
}

static void watch(struct connection *c, int operation, uint32_t events)
{
    if (operation == EPOLL_CTL_MOD && events == c->watched)
        return;
    c->watched = events;
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(poller, operation, c->fd, &event) < 0)
        die(1, "epoll_ctl: %s", strerror(errno));
}

static void disconnect(struct connection *c)
{
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    c->connected = false;
}

/* A stream receives nothing any more, whatever the reason. */
static void end_stream(struct connection *c)
{
    disconnect(c);
    text_free(&c->out);
    if (c->state == OPENING)
        result.being_opened--;
    if (goals.known && c->events < goal(c))
        goals.waiting--;
    c->state = OVER;
}

static void connect_failed(struct connection *c, int error)
{
    if (!reached)
        die(1, "cannot connect to %s port %ld: %s", options.host, options.port, strerror(error));
    result.connect_failed++;
    disconnect(c);
    if (c->publisher)
        c->retry_at = now() + RETRY_SECONDS;
    else
        end_stream(c);
}

static void start_connecting(struct connection *c)
{
    int on = 1;
    c->fd = socket(address->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        die(1, "socket: %s", strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    c->served = false;
    if (connect(c->fd, address->ai_addr, address->ai_addrlen) < 0 && errno != EINPROGRESS)
        connect_failed(c, errno);
    else
        watch(c, EPOLL_CTL_ADD, EPOLLOUT);
}

/* ---- Events of a stream --------------------------------------------------------------- */

static struct {
    double at;
    uint64_t wall;
} arrival; /* of the bytes being read */

static void deliver(struct connection *c)
{
    if (!result.counting)
        return;
    result.delivered++;
    result.last_delivery = arrival.at;
    if (options.expect == 0)
        samples_add(&result.latency, (float)(int64_t)(arrival.wall - c->lines.marker) / 1e6f);
    c->events++;
    if (goals.known && c->events == goal(c))
        goals.waiting--;
}

/* Look for a marker in a piece of a data line. The last piece may have ended within one. */
static void find_marker(struct lines *lines, const char *p, const char *end)
{
    for (; p < end && lines->marker == 0; p++) {
        if (*p == 'T') {
            lines->digits = 0;
            lines->number = 0;
        } else if (lines->digits == MARKER_DIGITS && *p == '.') {
            lines->marker = lines->number;
        } else if (in_range(lines->digits, 0, MARKER_DIGITS - 1) && in_range(*p, '0', '9')) {
            lines->digits++;
            lines->number = 10 * lines->number + (uint64_t)(*p - '0');
        } else {
            lines->digits = -1;
        }
    }
}

static void take_line_piece(struct lines *lines, const char *p, const char *end)
{
    for (; p < end && lines->matched < DATA; p++)
        lines->matched = *p == "data:"[lines->matched] ? lines->matched + 1 : OTHER_LINE;
    if (lines->matched == DATA)
        find_marker(lines, p, end);
}

static void end_line(struct connection *c)
{
    struct lines *lines = &c->lines;
    if (lines->matched == 0) { /* a blank line: the event, if it is one, is dispatched */
        if (lines->has_data && options.expect > 0)
            deliver(c);
        lines->has_data = false;
    } else if (lines->matched == DATA || lines->matched == DATA - 1) {
        lines->has_data = true; /* "data", without the colon, is a line of no data */
        if (lines->marker != 0 && options.expect == 0)
            deliver(c);
    }
    lines->matched = 0;
    lines->digits = -1;
    lines->marker = 0;
}

/* Give the place of the first CR or LF, or the end. */
static const char *line_end(const char *p, const char *end)
{
    const char *lf = memchr(p, '\n', (size_t)(end - p));
    /* Not beyond the LF: the whole rest would be looked through for every line. */
    const char *stop = lf != NULL ? lf : end;
    const char *cr = memchr(p, '\r', (size_t)(stop - p));
    return cr != NULL ? cr : stop;
}

static void take_body(struct connection *c, const char *p, size_t length)
{
    const char *end = p + length;
    while (p < end) {
        bool second_half = c->lines.after_cr && *p == '\n';
        c->lines.after_cr = false;
        if (second_half) {
            p++;
            continue;
        }
        const char *stop = line_end(p, end);
        take_line_piece(&c->lines, p, stop);
        p = stop;
        if (p < end) {
            c->lines.after_cr = *p++ == '\r';
            end_line(c);
        }
    }
}

/* ---- Answers -------------------------------------------------------------------------- */

static void malformed(struct answer *answer)
{
    answer->part = MALFORMED;
    result.malformed++;
}

/* Gather a line of a head or around a chunk. True when it is complete, without its end. */
static bool take_head_line(struct answer *answer, const char **p, const char *end)
{
    while (*p < end && answer->part != MALFORMED) {
        char byte = *(*p)++;
        if (++answer->head_bytes > MAX_HEAD_BYTES) {
            malformed(answer);
        } else if (byte == '\n') {
            if (answer->line_length > 0 && answer->line[answer->line_length - 1] == '\r')
                answer->line_length--;
            answer->line[answer->line_length] = '\0';
            answer->line_length = 0;
            return true;
        } else if (answer->line_length < HEAD_LINE_BYTES - 1) {
            answer->line[answer->line_length++] = byte;
        }
    }
    return false;
}

static void take_status_line(struct answer *answer)
{
    int minor, status;
    if (sscanf(answer->line, "HTTP/1.%1d %3d", &minor, &status) != 2 || status < 100) {
        malformed(answer);
        return;
    }
    answer->status = status;
    answer->closing = minor == 0;
    answer->part = HEADERS;
}

/* Give the value if the line is this header. */
static char *header_value(char *line, const char *name)
{
    size_t length = strlen(name);
    if (strncasecmp(line, name, length) != 0 || line[length] != ':')
        return NULL;
    return line + length + 1 + strspn(line + length + 1, " \t");
}

static void take_header(struct answer *answer)
{
    char *value, *end;
    if ((value = header_value(answer->line, "content-length")) != NULL) {
        answer->left = strtoull(value, &end, 10);
        answer->has_length = true;
        if (!isdigit((unsigned char)*value) || end[strspn(end, " \t")] != '\0')
            malformed(answer);
    } else if ((value = header_value(answer->line, "transfer-encoding")) != NULL) {
        answer->chunked = strcasestr(value, "chunked") != NULL;
    } else if ((value = header_value(answer->line, "connection")) != NULL) {
        if (strcasestr(value, "close") != NULL)
            answer->closing = true;
        else if (strcasestr(value, "keep-alive") != NULL)
            answer->closing = false;
    }
}

static void stream_answered(struct connection *c)
{
    result.statuses[c->answer.status]++;
    if (c->answer.status == 200) {
        result.opened++;
        result.being_opened--;
        c->state = OPEN;
        c->opened = true;
        return;
    }
    c->answer.part = COMPLETE; /* what else it says is of no interest */
    if (result.first_bad_status == 0)
        result.first_bad_status = c->answer.status;
}

static void end_of_head(struct connection *c)
{
    struct answer *answer = &c->answer;
    if (answer->status < 200) { /* "100 Continue" and the like: the answer is yet to come */
        *answer = (struct answer){0};
        return;
    }
    if (answer->status == 204 || answer->status == 304)
        answer->part = COMPLETE;
    else if (answer->chunked)
        answer->part = CHUNK_SIZE;
    else if (answer->has_length)
        answer->part = answer->left > 0 ? BY_LENGTH : COMPLETE;
    else
        answer->part = UNTIL_CLOSE;
    if (!c->publisher)
        stream_answered(c);
}

static void take_chunk_size(struct answer *answer)
{
    size_t digits = strspn(answer->line, "0123456789abcdefABCDEF");
    size_t zeros = strspn(answer->line, "0");
    char after = answer->line[digits];
    if (digits == 0 || digits - zeros > 15 || (after != '\0' && strchr("; \t", after) == NULL)) {
        malformed(answer);
        return;
    }
    answer->left = strtoull(answer->line, NULL, 16);
    answer->part = answer->left > 0 ? CHUNK_DATA : TRAILERS;
    answer->head_bytes = 0;
}

static void take_answer_line(struct connection *c)
{
    struct answer *answer = &c->answer;
    bool blank = answer->line[0] == '\0';
    if (answer->part == STATUS_LINE)
        take_status_line(answer);
    else if (answer->part == HEADERS && blank)
        end_of_head(c);
    else if (answer->part == HEADERS)
        take_header(answer);
    else if (answer->part == CHUNK_SIZE)
        take_chunk_size(answer);
    else if (answer->part == CHUNK_END && blank)
        answer->part = CHUNK_SIZE;
    else if (answer->part == CHUNK_END)
        malformed(answer);
    else if (answer->part == TRAILERS && blank)
        answer->part = COMPLETE;
}

/* Take what belongs to the body, as much as there is of it. */
static size_t take_answer_body(struct connection *c, const char *p, size_t length)
{
    struct answer *answer = &c->answer;
    if (answer->part != UNTIL_CLOSE && length > answer->left)
        length = (size_t)answer->left;
    if (c->state == OPEN)
        take_body(c, p, length);
    if (answer->part != UNTIL_CLOSE && (answer->left -= length) == 0)
        answer->part = answer->part == CHUNK_DATA ? CHUNK_END : COMPLETE;
    return length;
}

/* Take what belongs to the answer; give how much is left when that is complete. */
static size_t take_answer(struct connection *c, const char *p, size_t length)
{
    const char *end = p + length;
    struct answer *answer = &c->answer;
    while (p < end && answer->part < COMPLETE) {
        if (in_range((int)answer->part, CHUNK_DATA, UNTIL_CLOSE))
            p += take_answer_body(c, p, (size_t)(end - p));
        else if (take_head_line(answer, &p, end))
            take_answer_line(c);
    }
    return (size_t)(end - p);
}

/* ---- Publications --------------------------------------------------------------------- */

static void finish_publication(struct connection *c, bool answered)
{
    result.in_flight--;
    result.last_answer = now();
    c->busy = false;
    c->served |= answered;
    if (answered)
        result.publish_statuses[c->answer.status]++;
    if (!answered || c->answer.status / 100 != 2) {
        result.publish_failed++;
        return;
    }
    result.publish_ok++;
    goals.published[c->token]++;
    samples_add(&result.publish_latency, (float)((result.last_answer - c->began) * 1e3));
}

/* The server has closed, or what it said was no HTTP. `ended`: closed in good order. */
static void connection_lost(struct connection *c, bool ended)
{
    disconnect(c);
    if (!c->publisher) {
        result.closed_early++;
        end_stream(c);
        return;
    }
    if (c->busy)
        finish_publication(c, ended && c->answer.part == UNTIL_CLOSE);
    /* At once, unless it may go on like this for ever. */
    c->retry_at = now() + (c->served ? 0 : RETRY_SECONDS);
}

/* Send what can be sent of the request. */
static void flush(struct connection *c)
{
    while (c->sent < c->out.length) {
        ssize_t sent = send(c->fd, c->out.data + c->sent, c->out.length - c->sent, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) {
            watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
            return;
        }
        if (sent < 0 && errno != EINTR) {
            connection_lost(c, false);
            return;
        }
        c->sent += sent > 0 ? (size_t)sent : 0;
    }
    watch(c, EPOLL_CTL_MOD, EPOLLIN);
    if (!c->publisher)
        text_free(&c->out); /* thousands of them */
}

static void begin_request(struct connection *c, const char *method, const char *path, long number)
{
    bool bracketed = strchr(options.host, ':') != NULL;
    c->out.length = c->sent = 0;
    c->answer = (struct answer){0};
    text_add(&c->out, "%s ", method);
    text_add_path(&c->out, path, number);
    text_add(&c->out, " HTTP/1.1\r\nHost: %s%s%s:%ld\r\n", bracketed ? "[" : "", options.host,
             bracketed ? "]" : "", options.port);
    text_append(&c->out, &options.headers);
}

static void ask_for_stream(struct connection *c)
{
    begin_request(c, "GET", options.listen, c->number % options.tokens);
    text_append(&c->out, &options.listen_headers);
    text_add(&c->out, "Accept: text/event-stream\r\nCache-Control: no-store\r\n\r\n");
    flush(c);
}

static void publish(struct connection *c)
{
    c->token = result.published++ % options.tokens;
    c->busy = true;
    result.in_flight++;
    begin_request(c, "POST", options.publish, c->token);
    text_add(&c->out, "Content-Type: %s\r\nContent-Length: %ld\r\n\r\n", options.content_type,
             options.size);
    c->began = now();
    text_add(&c->out, "T%0*llu.", MARKER_DIGITS, (unsigned long long)wall_ns());
    text_fill(&c->out, 'x', (size_t)options.size - MARKER_BYTES);
    flush(c);
}

static void publication_answered(struct connection *c)
{
    /* An answer that did not wait for the whole request leaves the connection without use. */
    bool whole = c->sent == c->out.length;
    finish_publication(c, true);
    if (c->answer.closing || !whole) {
        disconnect(c);
        c->retry_at = now();
    }
}

/* ---- What the connections do ---------------------------------------------------------- */

static void finish_connecting(struct connection *c)
{
    int error = 0;
    socklen_t length = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length);
    if (error != 0) {
        connect_failed(c, error);
        return;
    }
    reached = c->connected = true;
    if (c->publisher)
        watch(c, EPOLL_CTL_MOD, EPOLLIN);
    else
        ask_for_stream(c);
}

static void receive_stream(struct connection *c, const char *p, size_t length)
{
    result.bytes += length;
    take_answer(c, p, length);
    bool complete = c->answer.part == COMPLETE;
    if (complete && c->state == OPENING)
        end_stream(c); /* the status is not 200 */
    else if (complete || c->answer.part == MALFORMED)
        connection_lost(c, false);
}

static void receive_answer(struct connection *c, const char *p, size_t length)
{
    size_t left = c->busy ? take_answer(c, p, length) : length;
    if (c->busy && c->answer.part == COMPLETE)
        publication_answered(c);
    if (left > 0 && c->connected && !c->busy)
        malformed(&c->answer); /* an answer to nothing */
    if (c->answer.part == MALFORMED)
        connection_lost(c, false);
}

static void receive(struct connection *c)
{
    static char buffer[READ_BYTES];
    ssize_t got = recv(c->fd, buffer, sizeof buffer, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        connection_lost(c, got == 0);
        return;
    }
    arrival.at = now();
    arrival.wall = wall_ns();
    if (c->publisher)
        receive_answer(c, buffer, (size_t)got);
    else
        receive_stream(c, buffer, (size_t)got);
}

static void on_event(struct connection *c, uint32_t events)
{
    if (!c->connected) {
        finish_connecting(c);
        return;
    }
    if (events & EPOLLOUT)
        flush(c);
    if (c->connected && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        receive(c);
}

/* Wait for the connections, but not beyond a time, and do what is to be done. */
static void turn(double until)
{
    until = later(earlier(until, stop_at), 0.001); /* zero would disarm the timer */
    struct itimerspec alarm = {.it_value.tv_sec = (time_t)until};
    alarm.it_value.tv_nsec = (long)((until - (double)alarm.it_value.tv_sec) * 1e9);
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &alarm, NULL);
    struct epoll_event events[BATCH];
    int count = epoll_wait(poller, events, BATCH, -1);
    if (count < 0 && errno != EINTR)
        die(1, "epoll_wait: %s", strerror(errno));
    for (int i = 0; i < count; i++)
        if (events[i].data.ptr != NULL) /* not the timer */
            on_event(events[i].data.ptr, events[i].events);
}

static bool out_of_time(void)
{
    if (now() < stop_at)
        return false;
    result.timed_out = true;
    return true;
}

/* ---- Phases --------------------------------------------------------------------------- */

static void rest(double seconds)
{
    double until = now() + seconds;
    while (now() < until && !out_of_time())
        turn(until);
}

static void begin_load(void)
{
    open_counters();
    result.cpu_began = cpu_seconds();
    result.own_cpu_began = seconds_of(CLOCK_PROCESS_CPUTIME_ID);
    result.began = result.last_delivery = result.last_answer = now();
}

static void end_load(void)
{
    result.cpu = cpu_seconds() - result.cpu_began;
    result.instructions = instructions();
    close_counters();
    result.own_cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID) - result.own_cpu_began;
    double last = result.delivered > 0 ? result.last_delivery : result.last_answer;
    result.seconds = last - result.began;
    result.counting = false;
}

static void open_streams(void)
{
    open_counters();
    double began = now(), cpu_began = cpu_seconds();
    for (long next = 0; (next < options.listeners || result.being_opened > 0) && !out_of_time();) {
        while (next < options.listeners && result.being_opened < options.at_once) {
            result.being_opened++;
            listeners[next].state = OPENING;
            start_connecting(&listeners[next++]);
        }
        if (result.being_opened > 0)
            turn(stop_at);
    }
    result.open_seconds = now() - began;
    result.open_cpu = cpu_seconds() - cpu_began;
    result.open_instructions = instructions();
    close_counters();
}

static double earliest_retry(void)
{
    double at = stop_at;
    for (long i = 0; i < options.publishers; i++)
        if (publishers[i].fd < 0)
            at = earlier(at, publishers[i].retry_at);
    return at;
}

static void reconnect_due(void)
{
    for (long i = 0; i < options.publishers; i++)
        if (publishers[i].fd < 0 && publishers[i].retry_at <= now())
            start_connecting(&publishers[i]);
}

static bool publishers_connected(void)
{
    for (long i = 0; i < options.publishers; i++)
        if (!publishers[i].connected)
            return false;
    return true;
}

/* The first one that is free, so that a slow schedule keeps one connection warm. */
static struct connection *free_publisher(void)
{
    for (long i = 0; i < options.publishers; i++)
        if (publishers[i].connected && !publishers[i].busy)
            return &publishers[i];
    return NULL;
}

/* Publish all that is due and can be; give the time at which there may be more to do. */
static double publish_due(void)
{
    reconnect_due();
    struct connection *c;
    while (result.published < options.events && (c = free_publisher()) != NULL) {
        if (options.rate > 0) {
            double due = result.began + (double)result.published / options.rate;
            double at = now();
            if (at < due)
                return earlier(due, earliest_retry());
            result.late = later(result.late, at - due);
        }
        publish(c);
    }
    return earliest_retry();
}

/* All publications are answered: what each stream is to receive does not change any more. */
static void set_goals(void)
{
    goals.known = true;
    goals.since = now();
    for (long i = 0; i < options.listeners; i++)
        goals.waiting += listeners[i].state == OPEN && listeners[i].events < goal(&listeners[i]);
}

static void publish_all(void)
{
    while (!publishers_connected() && !out_of_time()) {
        reconnect_due();
        turn(earliest_retry());
    }
    begin_load();
    while (!out_of_time()) {
        if (result.published < options.events) {
            turn(publish_due());
        } else if (result.in_flight > 0) {
            turn(stop_at);
        } else {
            if (!goals.known)
                set_goals();
            double quiet_at = later(result.last_delivery, goals.since) + options.quiet;
            if (goals.waiting == 0 || now() >= quiet_at)
                break;
            turn(quiet_at);
        }
    }
    end_load();
}

static void wait_for_replay(void)
{
    while (goals.waiting > 0 && !out_of_time())
        turn(stop_at);
    end_load();
}

static void run(void)
{
    result.before = footprint();
    if (options.expect > 0) {
        begin_load(); /* it may arrive while other streams are being opened */
        goals.known = true;
        goals.waiting = options.listeners;
    }
    open_streams();
    rest(options.idle);
    result.after = footprint();
    if (options.publish != NULL)
        publish_all();
    else if (options.expect > 0)
        wait_for_replay();
    else
        begin_load();
    rest(options.stay);
    if (result.counting)
        end_load();
}

/* ---- The report ----------------------------------------------------------------------- */

static const char *separator = "";

static void print_key(const char *key)
{
    printf("%s\"%s\": ", separator, key);
    separator = ", ";
}

static void print_count(const char *key, uint64_t count)
{
    print_key(key);
    printf("%llu", (unsigned long long)count);
}

/* Print a number, or null where there is none: not measured, or divided by nothing. */
static void print_number(const char *key, double number)
{
    print_key(key);
    if (isfinite(number))
        printf("%.3f", number);
    else
        printf("null");
}

static void print_whole(const char *key, double number)
{
    print_key(key);
    if (isfinite(number))
        printf("%.0f", number);
    else
        printf("null");
}

static void print_flag(const char *key, bool flag)
{
    print_key(key);
    printf(flag ? "true" : "false");
}

static void open_object(const char *key)
{
    print_key(key);
    printf("{");
    separator = "";
}

static void close_object(void)
{
    printf("}");
    separator = ", ";
}

static void print_samples(const char *key, struct samples *samples)
{
    if (samples->length == 0) {
        print_number(key, NAN);
        return;
    }
    qsort(samples->values, samples->length, sizeof *samples->values, by_value);
    open_object(key);
    print_number("p50", percentile(samples, 50));
    print_number("p90", percentile(samples, 90));
    print_number("p99", percentile(samples, 99));
    print_number("max", samples->most);
    close_object();
}

static void print_statuses(const char *key, const long *counts)
{
    open_object(key);
    for (int status = 100; status < 1000; status++) {
        char name[16];
        snprintf(name, sizeof name, "%d", status);
        if (counts[status] > 0)
            print_count(name, (uint64_t)counts[status]);
    }
    close_object();
}

static void report_opening(void)
{
    print_count("listeners", (uint64_t)options.listeners);
    print_count("opened", (uint64_t)result.opened);
    print_count("connect_failed", (uint64_t)result.connect_failed);
    print_count("closed_early", (uint64_t)result.closed_early);
    print_count("malformed", (uint64_t)result.malformed);
    print_statuses("statuses", result.statuses);
    double bad = (double)result.first_bad_status;
    print_whole("first_bad_status", bad > 0 ? bad : NAN);
    print_number("open_seconds", result.open_seconds);
    print_number("open_cpu_us", result.open_cpu * 1e6 / (double)result.opened);
    print_number("open_instructions", result.open_instructions / (double)result.opened);
}

static void report_footprint(void)
{
    const struct footprint *before = &result.before, *after = &result.after;
    print_whole("rss_before_kib", before->rss_kib);
    print_whole("rss_after_kib", after->rss_kib);
    print_number("rss_per_stream_kib", (after->rss_kib - before->rss_kib) / (double)result.opened);
    print_whole("pss_before_kib", before->pss_kib);
    print_whole("pss_after_kib", after->pss_kib);
    print_number("pss_per_stream_kib", (after->pss_kib - before->pss_kib) / (double)result.opened);
    print_whole("threads_before", before->threads);
    print_whole("threads_after", after->threads);
    print_whole("fds", after->fds);
    print_count("pids_gone", (uint64_t)pids_gone);
    print_key("cpu_clock");
    printf(options.pid_count == 0 ? "null" : cpu_by_clock ? "\"process\"" : "\"stat\"");
}

static void report_publications(void)
{
    print_count("published", (uint64_t)result.published);
    print_count("publish_ok", (uint64_t)result.publish_ok);
    print_count("publish_failed", (uint64_t)result.publish_failed);
    print_statuses("publish_statuses", result.publish_statuses);
    print_number("late_ms", result.late * 1e3);
    print_samples("publish_latency_ms", &result.publish_latency);
}

static void report_deliveries(void)
{
    uint64_t expected = 0, lost = 0, extra = 0, least = UINT64_MAX, most = 0;
    for (long i = 0; i < options.listeners; i++) {
        const struct connection *c = &listeners[i];
        /* A stream that was never open is missing in `opened`, and not in deliveries too. */
        uint64_t events = c->events, due = c->opened ? goal(c) : 0;
        expected += due;
        lost += due > events ? due - events : 0;
        extra += events > due ? events - due : 0;
        least = events < least ? events : least;
        most = events > most ? events : most;
    }
    print_count("delivered", result.delivered);
    print_count("expected", expected);
    print_count("lost", lost);
    print_count("extra", extra);
    print_count("per_listener_min", options.listeners > 0 ? least : 0);
    print_count("per_listener_max", most);
    print_count("bytes_received", result.bytes);
    print_samples("latency_ms", &result.latency);
}

static void report_costs(void)
{
    print_number("seconds", result.seconds);
    print_number("deliveries_per_second", (double)result.delivered / result.seconds);
    print_number("cpu_us_per_delivery", result.cpu * 1e6 / (double)result.delivered);
    print_number("instructions_per_delivery", result.instructions / (double)result.delivered);
    print_number("cpu_us_per_publish", result.cpu * 1e6 / (double)result.published);
    print_number("own_cpu_seconds", result.own_cpu);
    print_flag("timed_out", result.timed_out);
}

static void report(void)
{
    printf("{");
    report_opening();
    report_footprint();
    report_publications();
    report_deliveries();
    report_costs();
    printf("}\n");
}

/* ---- Begin and end -------------------------------------------------------------------- */

static struct connection *make_connections(long count, bool publisher)
{
    struct connection *all = grown(NULL, (size_t)count, sizeof *all);
    for (long i = 0; i < count; i++)
        all[i] = (struct connection){
            .fd = -1, .number = i, .publisher = publisher, .lines.digits = -1};
    return all;
}

static void free_connections(struct connection *all, long count)
{
    for (long i = 0; i < count; i++) {
        disconnect(&all[i]);
        text_free(&all[i].out);
    }
    free(all);
}

static void raise_fd_limit(void)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    rlim_t needed = (rlim_t)(options.listeners + options.publishers + SPARE_FDS);
    if (limit.rlim_cur < needed)
        die(USAGE, "%ld connections are more than the limit of %llu open files allows",
            options.listeners + options.publishers, (unsigned long long)limit.rlim_cur);
}

static void find_server(void)
{
    char port[16];
    snprintf(port, sizeof port, "%ld", options.port);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    int error = getaddrinfo(options.host, port, &hints, &address);
    if (error != 0)
        die(USAGE, "--host: '%s': %s", options.host, gai_strerror(error));
}

static void set_up(void)
{
    if (options.publish == NULL)
        options.publishers = 0;
    raise_fd_limit();
    find_server();
    choose_cpu_clock();
    poller = epoll_create1(EPOLL_CLOEXEC);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN};
    if (poller < 0 || timer < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, timer, &event) < 0)
        die(1, "epoll: %s", strerror(errno));
    goals.published = calloc((size_t)options.tokens, sizeof *goals.published);
    if (goals.published == NULL)
        die(1, "out of memory");
    listeners = make_connections(options.listeners, false);
    publishers = make_connections(options.publishers, true);
    stop_at = now() + options.timeout;
}

static void tear_down(void)
{
    free_connections(listeners, options.listeners);
    free_connections(publishers, options.publishers);
    free(goals.published);
    free(result.latency.values);
    free(result.publish_latency.values);
    text_free(&options.headers);
    text_free(&options.listen_headers);
    freeaddrinfo(address);
    close(timer);
    close(poller);
}

int main(int argc, char **argv)
{
    read_options(argc, argv);
    set_up();
    run();
    report();
    tear_down();
    return 0;
}
