/* Writes a disk at depth THREADS, reads each block back, and says on the console what was acknowledged.
 *
 *     blkwriter DEVICE PLACES
 *
 * Thread t makes its writes 1, 2, 3 ... one after the other; write n goes to place n % PLACES of its own. A block says
 * everywhere whose it is and ends with a checksum, so a torn or stale one is found, here and by whoever reads the disk.
 * As a thread has one write under way, its counter says exactly which writes were acknowledged. The block behind all
 * places is for the host: when it begins with "stop", the threads end, everything is read once more, and the last
 * report is exact.
 *
 * Output: "HCD: verified=N" (writes that were read back), "HCD: acked=n0,n1,..." (per thread), at the end "HCD: final=..."
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define THREADS 32
#define BLOCK 4096
#define WORDS (BLOCK / 8)
#define MAGIC 0x6b636f6c62646368ull

static int disk;
static long places;
static atomic_ulong acked[THREADS];
static atomic_ulong verified;
static atomic_int stopping;

static void fail(const char *what, int thread, unsigned long n)
{
    printf("HCD: error=%s, thread %d, write %lu: %s\n", what, thread, n, strerror(errno));
    fflush(stdout);
    _exit(1);
}

static void *aligned(void)
{
    void *p = NULL;
    if (posix_memalign(&p, BLOCK, BLOCK))
        fail("no memory", -1, 0);
    return p;
}

static uint64_t checksum(const uint64_t *words)
{
    uint64_t sum = 0xcbf29ce484222325ull;
    for (int i = 0; i < WORDS - 1; i++)
        sum = (sum ^ words[i]) * 0x100000001b3ull;
    return sum;
}

static void make(uint64_t *words, int thread, unsigned long n)
{
    for (int i = 0; i < WORDS - 1; i += 3) {
        words[i] = MAGIC;
        if (i + 1 < WORDS - 1)
            words[i + 1] = (uint64_t)thread;
        if (i + 2 < WORDS - 1)
            words[i + 2] = n;
    }
    words[WORDS - 1] = checksum(words);
}

static off_t place_of(int thread, unsigned long n) { return ((off_t)thread * places + (long)(n % places)) * BLOCK; }

static void expect(int thread, unsigned long n, uint64_t *got, const uint64_t *wanted)
{
    ssize_t have = pread(disk, got, BLOCK, place_of(thread, n));
    if (have != BLOCK)
        fail("read", thread, n);
    if (memcmp(got, wanted, BLOCK) != 0) {
        errno = 0;
        fail("read something else", thread, n);
    }
}

static void *run(void *argument)
{
    int thread = (int)(intptr_t)argument;
    uint64_t *out = aligned(), *in = aligned();
    for (unsigned long n = 1; !atomic_load(&stopping); n++) {
        make(out, thread, n);
        if (pwrite(disk, out, BLOCK, place_of(thread, n)) != BLOCK)
            fail("write", thread, n);
        atomic_store(&acked[thread], n);
        expect(thread, n, in, out);
        atomic_fetch_add(&verified, 1);
    }
    return NULL;
}

static void report(const char *key)
{
    printf("HCD: %s=", key);
    for (int i = 0; i < THREADS; i++)
        printf("%s%lu", i ? "," : "", atomic_load(&acked[i]));
    printf("\nHCD: verified=%lu\n", atomic_load(&verified));
    fflush(stdout);
}

static int told_to_stop(void *block)
{
    if (pread(disk, block, BLOCK, (off_t)THREADS * places * BLOCK) != BLOCK)
        fail("control read", -1, 0);
    return memcmp(block, "stop", 4) == 0;
}

int main(int argc, char **argv)
{
    pthread_t threads[THREADS];
    uint64_t *block = aligned(), *wanted = aligned();
    if (argc != 3 || (places = atol(argv[2])) < 1)
        return 2;
    disk = open(argv[1], O_RDWR | O_DIRECT);
    if (disk < 0)
        fail("open", -1, 0);
    for (intptr_t i = 0; i < THREADS; i++)
        if ((errno = pthread_create(&threads[i], NULL, run, (void *)i)))
            fail("thread", (int)i, 0);
    while (!told_to_stop(block)) {
        report("acked");
        usleep(100000);
    }
    atomic_store(&stopping, 1);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < THREADS; i++) {
        unsigned long last = atomic_load(&acked[i]);
        for (unsigned long n = last; n > 0 && n + places > last; n--) {
            make(wanted, i, n);
            expect(i, n, block, wanted);
        }
    }
    report("final");
    return 0;
}
