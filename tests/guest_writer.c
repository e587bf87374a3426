/* A writer that knows what a disk must hold: DEPTH threads, each with one write of 4096 bytes in flight (O_DIRECT).
 *
 *     writer DEVICE DEPTH SLOTS
 *
 * Block 0 is a mailbox: the writer stops when the other side of the disk puts "stop" there. After it, each thread owns
 * SLOTS blocks. The content of a block follows from its number and from how often it was written, all 4096 bytes of
 * it, so a block that is lost, stale, torn or somebody else's is told apart. After every 8 writes a thread reads one of
 * its blocks back; at the end all of them are read.
 *
 * It says on its standard output, as lines "HCD: key=value": writes (acknowledged so far, ten times a second), then
 * verified (blocks that were read back at the end); or error, and then it exits with 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK = 4096, WORDS = BLOCK / 8, READ_EVERY = 8 };

static const char *device;
static int slots;
static volatile int stopping;

struct worker {
    pthread_t thread;
    int number;
    int fd;
    uint64_t writes;      /* acknowledged; read by the main thread */
    uint64_t *versions;   /* of each slot: how often it was written */
    uint64_t *buffer;
    uint64_t random;
};

static void fail(const char *what, uint64_t block, uint64_t version)
{
    printf("HCD: error=%s block %llu version %llu: %s\n", what, (unsigned long long)block, (unsigned long long)version,
           strerror(errno));
    fflush(stdout);
    _exit(1);
}

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t word(uint64_t block, uint64_t version, int i)
{
    if (i < 2)
        return i ? version : block;
    return mix(block * 0x100000001b3u ^ version << 20 ^ (uint64_t)i);
}

static uint64_t block_of(const struct worker *w, int slot)
{
    return 1 + (uint64_t)w->number * slots + slot;
}

static void check(struct worker *w, int slot)
{
    uint64_t block = block_of(w, slot), version = w->versions[slot];
    errno = 0;
    if (pread(w->fd, w->buffer, BLOCK, block * BLOCK) != BLOCK)
        fail("read", block, version);
    for (int i = 0; i < WORDS; i++)
        if (w->buffer[i] != word(block, version, i)) {
            printf("HCD: found=word %d of block %llu version %llu\n", i, (unsigned long long)w->buffer[0],
                   (unsigned long long)w->buffer[1]);
            fail("compare", block, version);
        }
}

static void *work(void *argument)
{
    struct worker *w = argument;
    while (!stopping) {
        int slot = (w->random = mix(w->random)) % slots;
        uint64_t block = block_of(w, slot), version = w->versions[slot] + 1;
        for (int i = 0; i < WORDS; i++)
            w->buffer[i] = word(block, version, i);
        errno = 0;
        if (pwrite(w->fd, w->buffer, BLOCK, block * BLOCK) != BLOCK)
            fail("write", block, version);
        w->versions[slot] = version;
        __atomic_store_n(&w->writes, w->writes + 1, __ATOMIC_RELAXED);
        if (w->writes % READ_EVERY == 0)
            check(w, slot);
    }
    return NULL;
}

static uint64_t total(const struct worker *workers, int depth)
{
    uint64_t sum = 0;
    for (int i = 0; i < depth; i++)
        sum += __atomic_load_n(&workers[i].writes, __ATOMIC_RELAXED);
    return sum;
}

static void *aligned(void)
{
    void *p;
    if (posix_memalign(&p, BLOCK, BLOCK))
        fail("memory", 0, 0);
    return p;
}

int main(int argc, char **argv)
{
    int depth = argc > 3 ? atoi(argv[2]) : 0;
    if (depth < 1 || (slots = atoi(argv[3])) < 1)
        return 2;
    device = argv[1];
    int fd = open(device, O_RDWR | O_DIRECT);
    if (fd < 0)
        fail("open", 0, 0);
    struct worker *workers = calloc(depth, sizeof *workers);
    char *mailbox = aligned();
    for (int i = 0; i < depth; i++) {
        struct worker *w = &workers[i];
        *w = (struct worker){ .number = i, .fd = fd, .buffer = aligned(), .random = mix(i) };
        w->versions = calloc(slots, sizeof *w->versions);
        if (pthread_create(&w->thread, NULL, work, w))
            fail("thread", 0, 0);
    }
    do {
        usleep(100000);
        printf("HCD: writes=%llu\n", (unsigned long long)total(workers, depth));
        fflush(stdout);
        if (pread(fd, mailbox, BLOCK, 0) != BLOCK)
            fail("mailbox", 0, 0);
    } while (memcmp(mailbox, "stop", 4));
    stopping = 1;
    uint64_t verified = 0;
    for (int i = 0; i < depth; i++) {
        pthread_join(workers[i].thread, NULL);
        for (int slot = 0; slot < slots; slot++)
            if (workers[i].versions[slot]) {
                check(&workers[i], slot);
                verified++;
            }
    }
    if (fsync(fd))
        fail("flush", 0, 0);
    printf("HCD: writes=%llu\nHCD: verified=%llu\n", (unsigned long long)total(workers, depth),
           (unsigned long long)verified);
    return 0;
}
