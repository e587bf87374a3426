/* A second front end for make bench: block requests over vhost-user, in C, sharing nothing with hcd's own.
 *
 * It differs on purpose where drivers differ: a request is one descriptor that points at an indirect table (as Linux
 * does it), each request is made available and decided about on its own (no batches), and a completion is looked at
 * in the order of the used ring, one at a time. It always sleeps on the call eventfd when nothing is used.
 *
 *     second_frontend SOCKET read|write DEPTH SIZE SECONDS
 *
 * prints: requests requests/s p50_us p99_us kicks calls
 * Exit status 1 with a line on stderr when anything is wrong, a failed request included.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { GET_FEATURES = 1, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR,
       SET_VRING_BASE, SET_VRING_KICK = 12, SET_VRING_CALL, GET_PROTOCOL_FEATURES = 15, SET_PROTOCOL_FEATURES,
       SET_VRING_ENABLE = 18, GET_CONFIG = 24 };
#define F_INDIRECT (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_PROTOCOL (1ull << 30)
#define F_VERSION_1 (1ull << 32)
#define F_FLUSH (1ull << 9)      /* without it a device must not cache writes (virtio 1.3, 5.2.6.2) */
#define PF_CONFIG (1ull << 9)
#define RING 256
#define GUEST 0x100000000ull
#define D_NEXT 1
#define D_WRITE 2
#define D_INDIRECT 4
#define MOST_US 1000000

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct used { uint32_t id, len; };
struct message { uint32_t request, flags, size; unsigned char body[256]; } __attribute__((packed));
/* of each request */
struct slot { struct desc table[3]; uint32_t kind, priority; uint64_t sector; unsigned char status; char pad[63]; };

static int sock, kick_fd, call_fd;
static char *memory;
static uint32_t depth, size;
static struct desc *table;
static uint16_t *avail, *used16;
static struct used *ring;
static struct slot *slots;
static char *data;
static uint64_t submitted[RING], sectors, random_state = 88172645463325252ull;
static uint16_t next_avail, last_used;
static uint64_t kicks, calls, requests;
static uint32_t tenths[10 * MOST_US / 1000 * 100];

static void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* -- messages */

static void tell(uint32_t request, const void *body, uint32_t length, int fd)
{
    struct message m = { request, 1, length, { 0 } };
    char control[CMSG_SPACE(sizeof(int))] = { 0 };
    struct iovec iov = { &m, 12 + length };
    struct msghdr h = { .msg_iov = &iov, .msg_iovlen = 1 };
    memcpy(m.body, body, length);
    if (fd >= 0) {
        h.msg_control = control;
        h.msg_controllen = sizeof(control);
        struct cmsghdr *c = CMSG_FIRSTHDR(&h);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof(int));
    }
    if (sendmsg(sock, &h, MSG_NOSIGNAL) != (ssize_t)(12 + length))
        die("request %u: %s", request, strerror(errno));
}

static void ask(uint32_t request, const void *body, uint32_t length, void *answer, uint32_t expected)
{
    struct message m;
    tell(request, body, length, -1);
    if (recv(sock, &m, 12, MSG_WAITALL) != 12 || m.request != request || m.size != expected)
        die("request %u: no proper answer", request);
    if (recv(sock, answer, expected, MSG_WAITALL) != (ssize_t)expected)
        die("request %u: the answer is cut short", request);
}

static void tell_u64(uint32_t request, uint64_t value, int fd) { tell(request, &value, 8, fd); }

static void tell_state(uint32_t request, uint32_t number)
{
    uint32_t body[2] = { 0, number };
    tell(request, body, 8, -1);
}

static void negotiate(void)
{
    uint64_t features, protocol, wanted = F_INDIRECT | F_EVENT_IDX | F_PROTOCOL | F_FLUSH | F_VERSION_1;
    unsigned char config[12 + 60] = { 0 };
    uint32_t header[3] = { 0, 60, 0 };
    ask(GET_FEATURES, NULL, 0, &features, 8);
    if ((features & wanted) != wanted)
        die("the back end offers %llx, not all of %llx", (unsigned long long)features, (unsigned long long)wanted);
    ask(GET_PROTOCOL_FEATURES, NULL, 0, &protocol, 8);
    if (!(protocol & PF_CONFIG))
        die("the back end has no configuration space");
    tell_u64(SET_PROTOCOL_FEATURES, PF_CONFIG, -1);
    tell(SET_OWNER, NULL, 0, -1);
    tell_u64(SET_FEATURES, wanted, -1);
    memcpy(config, header, 12);
    ask(GET_CONFIG, config, sizeof(config), config, sizeof(config));
    memcpy(&sectors, config + 12, 8);
}

static uint64_t user(const void *p) { return (uint64_t)(uintptr_t)p; }

static uint64_t guest(const void *p) { return GUEST + (uint64_t)((const char *)p - memory); }

static void share(void)
{
    size_t room = (1u << 20) + (size_t)depth * size;
    int fd = memfd_create("second", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)room) != 0)
        die("no memory");
    memory = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        die("no memory");
    struct { uint32_t count, pad; uint64_t guest, size, user, offset; } region = { 1, 0, GUEST, room, user(memory), 0 };
    tell(SET_MEM_TABLE, &region, sizeof(region), fd);
}

static void start(void)
{
    table = (void *)memory;
    avail = (void *)(memory + 16384);
    used16 = (void *)(memory + 32768);
    ring = (void *)(memory + 32768 + 4);
    slots = (void *)(memory + 65536);
    data = memory + (1 << 20);
    struct { uint32_t index, flags; uint64_t desc, used, avail, log; } place = { 0, 0, user(table), user(used16),
                                                                                user(avail), 0 };
    kick_fd = eventfd(1, EFD_NONBLOCK);      /* as QEMU does: rung once before anything is there */
    call_fd = eventfd(0, EFD_NONBLOCK);
    tell_state(SET_VRING_NUM, RING);
    tell_state(SET_VRING_BASE, 0);
    tell(SET_VRING_ADDR, &place, sizeof(place), -1);
    tell_u64(SET_VRING_KICK, 0, kick_fd);
    tell_u64(SET_VRING_CALL, 0, call_fd);
    tell_state(SET_VRING_ENABLE, 1);
}

/* -- requests */

static void submit(uint32_t i, int writes)
{
    struct slot *s = &slots[i];
    uint64_t one = 1;
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    s->kind = (uint32_t)writes;
    s->sector = random_state % (sectors * 512 / size) * (size / 512);
    s->status = 0xff;
    s->table[0] = (struct desc){ guest(&s->kind), 16, D_NEXT, 1 };
    s->table[1] = (struct desc){ guest(data + (size_t)i * size), size, D_NEXT | (writes ? 0 : D_WRITE), 2 };
    s->table[2] = (struct desc){ guest(&s->status), 1, D_WRITE, 0 };
    table[i] = (struct desc){ guest(s->table), sizeof(s->table), D_INDIRECT, 0 };
    avail[2 + next_avail % RING] = (uint16_t)i;
    submitted[i] = now();
    next_avail++;
    __atomic_store_n(&avail[1], next_avail, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&used16[2 + 4 * RING], __ATOMIC_RELAXED) == (uint16_t)(next_avail - 1)) {
        kicks++;
        if (write(kick_fd, &one, 8) != 8)
            die("the kick eventfd is full");
    }
}

/* The request at the end of the used ring; sleeps until there is one. */
static uint32_t take(void)
{
    while (__atomic_load_n(&used16[1], __ATOMIC_ACQUIRE) == last_used) {
        uint64_t value;
        struct pollfd p = { call_fd, POLLIN, 0 };
        avail[2 + RING] = last_used;
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (__atomic_load_n(&used16[1], __ATOMIC_ACQUIRE) != last_used)
            break;
        if (poll(&p, 1, 5000) != 1)
            die("the device did not answer for 5 s");
        if (read(call_fd, &value, 8) == 8)
            calls += value;
    }
    uint32_t id = ring[last_used % RING].id;
    last_used++;
    if (id >= depth || slots[id].status != 0)
        die("request %u failed", id);
    return id;
}

static void load(int writes, double seconds)
{
    uint64_t end = now() + (uint64_t)(seconds * 1e9);
    uint32_t inflight = 0;
    requests = kicks = calls = 0;
    memset(tenths, 0, sizeof(tenths));
    for (; inflight < depth; inflight++)
        submit(inflight, writes);
    while (inflight) {
        uint32_t id = take();
        uint64_t t = now(), took = (t - submitted[id]) / 100;
        tenths[took < sizeof(tenths) / 4 ? took : sizeof(tenths) / 4 - 1]++;
        requests++;
        if (t < end)
            submit(id, writes);
        else
            inflight--;
    }
}

static double quantile(double q)
{
    uint64_t seen = 0;
    for (uint32_t i = 0; i < sizeof(tenths) / 4; i++) {
        seen += tenths[i];
        if (seen >= q * (double)requests)
            return i / 10.0;
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    if (argc != 6)
        die("usage: second_frontend SOCKET read|write DEPTH SIZE SECONDS");
    strncpy(address.sun_path, argv[1], sizeof(address.sun_path) - 1);
    int writes = strcmp(argv[2], "write") == 0;
    depth = (uint32_t)atoi(argv[3]);
    size = (uint32_t)atoi(argv[4]);
    double seconds = atof(argv[5]);
    if (depth < 1 || depth > RING || size < 512 || size % 512)
        die("depth or size out of range");
    sock = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(sock, (void *)&address, sizeof(address)) != 0)
        die("cannot connect to %s: %s", argv[1], strerror(errno));
    negotiate();
    share();
    start();
    load(writes, 0.3);
    load(writes, seconds);
    printf("%llu %.1f %.1f %.1f %llu %llu\n", (unsigned long long)requests, (double)requests / seconds, quantile(0.5),
           quantile(0.99), (unsigned long long)kicks, (unsigned long long)calls);
    return 0;
}
