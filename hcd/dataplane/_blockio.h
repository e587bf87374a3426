/* The worker of a block file: threads that wait for the disk so that the reactor does not.
 *
 * Theory of operation.
 *
 * - Jobs come in batches from one thread (submit), under one lock and with at most one wake-up. They go back over one
 *   list and one eventfd, which is written when the list stops being empty: one wake-up of the reactor for all that
 *   finished meanwhile.
 * - There are two lines. Writes through the page cache take the file's inode lock, one after the other however many
 *   threads try, and are mostly plain memory copies: one thread at a time works on that line, a batch in a go.
 *   Everything that may sleep for long (reads that missed the page cache, flushes, discards, writes that must reach the
 *   disk) stands in the other line, one job for each thread. The lines are served by age of their first job.
 * - Threads are started when there is work and nobody idle, up to a limit, and live until the pool stops. A thread that
 *   takes work and leaves some wakes the next one.
 * - A small write to pages that the page cache holds is a copy into a mapping of the file: the same pages that
 *   pwrite(2) would fill, without its price of several copies (it takes locks and talks to the journal each time; the
 *   mapping does that once for a page until it is written back). fdatasync(2) covers both. A copy that faults (the disk
 *   is full, the file was cut short, the guest's memory went away) is done again by pwrite, which says why.
 * - Reads and writes of a file that was opened with O_DIRECT go to an io_uring first (_uring.h), and to the lines only
 *   with what it did not do.
 * - No Python here: a job's `request` is carried, never looked at. Its scatter list and the guest memory behind it stay
 *   valid because whoever made the job holds references. Memory that was revoked meanwhile makes the system call fail
 *   with EFAULT.
 */
#ifndef HCD_BLOCKIO_H
#define HCD_BLOCKIO_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "_atomics.h"
#include "_uring.h"

#define HCD_POOL_MOST 16            /* threads of one pool */
#define HCD_POOL_BATCH 16           /* writes that a thread takes at once */
#define HCD_POOL_TELL_NS 50000      /* the longest that a finished write waits for its batch */
#define HCD_PIECES 128              /* of a scatter list, for one system call */
#define HCD_PATTERN 65536           /* bytes that are written over and over */
#define HCD_MAPPED_MOST (64 << 10)  /* a longer write is left to one system call */
#define HCD_DETOUR (256 << 10)      /* bytes at once of a transfer that O_DIRECT does not take as it lies */
#define HCD_ALIGNMENT 4096

enum { HCD_READ, HCD_WRITE, HCD_FLUSH, HCD_DISCARD, HCD_ZERO, HCD_SAME, HCD_COMPARE };
#define HCD_DIFFERENT -1            /* "errno" of HCD_COMPARE: the file has other bytes than the request */
enum { HCD_LINE_ANY, HCD_LINE_WRITES, HCD_LINES };

typedef struct {
    uint64_t offset;                /* bytes */
    uint64_t length;
    int unmap;
} hcd_range_t;

typedef struct hcd_job {
    struct hcd_job *next;
    void *request;                  /* Python's; likewise memory */
    void *memory;
    const struct iovec *iov;        /* the piece that the transfer has reached */
    uint64_t at;                    /* how far into it */
    uint64_t offset;                /* in the file */
    uint64_t left;
    uint64_t moved;
    uint64_t seq;
    hcd_range_t *ranges;
    uint32_t n_ranges;
    char *pattern;                  /* HCD_PATTERN bytes for HCD_SAME, else NULL */
    int kind;
    int sync;                       /* on stable storage before it counts as done */
    int error;                      /* errno, 0 for success */
} hcd_job;

typedef struct {
    hcd_job *first;
    hcd_job **end;
} hcd_list;

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t work;            /* there may be a job to take, or the pool stops */
    pthread_cond_t gone;            /* a thread ended */
    hcd_list lines[HCD_LINES];
    hcd_list done;
    uint64_t seq;
    int fd;
    int done_fd;
    int block_device;
    int direct;                     /* O_DIRECT: writes don't share a lock */
    int writing;                    /* a thread works on the line of writes */
    int idle;
    int threads;
    int started;
    int most;
    int stopping;
    char *map;                      /* the file, or NULL */
    uint64_t map_length;
    hcd_uring *ring;                /* or NULL; under the lock */
    uint64_t ring_jobs;             /* that the ring took */
    uint64_t ring_rest;             /* of which a thread had to do the rest */
    int (*copy)(void *to, const void *from, size_t n);      /* -1 when either side faulted */
    pthread_t handles[HCD_POOL_MOST];
} hcd_pool;

static const char hcd_zeroes[HCD_PATTERN] __attribute__((aligned(HCD_ALIGNMENT)));

/* -- lists */

static inline void hcd_list_clear(hcd_list *list) { list->first = NULL; list->end = &list->first; }

static inline void hcd_list_add(hcd_list *list, hcd_job *job)
{
    job->next = NULL;
    *list->end = job;
    list->end = &job->next;
}

static inline void hcd_list_move(hcd_list *to, hcd_list *from)
{
    if (from->first == NULL)
        return;
    *to->end = from->first;
    to->end = from->end;
    hcd_list_clear(from);
}

static inline hcd_job *hcd_list_take(hcd_list *list)
{
    hcd_job *job = list->first;
    list->first = job->next;
    if (list->first == NULL)
        list->end = &list->first;
    return job;
}

/* -- doing one job */

/* The scatter list of what is left, up to `most` pieces; their number. */
static int hcd_job_pieces(const hcd_job *job, struct iovec *to, int most)
{
    const struct iovec *from = job->iov;
    uint64_t left = job->left, at = job->at;
    int n = 0;
    while (left && n < most) {
        uint64_t part = from->iov_len - at;
        if (part > left)
            part = left;
        to[n].iov_base = (char *)from->iov_base + at;
        to[n].iov_len = part;
        left -= part;
        at = 0;
        from++;
        n++;
    }
    return n;
}

static void hcd_job_advance(hcd_job *job, uint64_t n)
{
    job->offset += n;
    job->moved += n;
    job->left -= n;
    n += job->at;
    while (job->left && n >= job->iov->iov_len) {
        n -= job->iov->iov_len;
        job->iov++;
    }
    job->at = n;
}

/* The next part of a job through memory of our own; as pread(2) and pwrite(2). */
static ssize_t hcd_job_detour(int fd, const hcd_job *job, char *buffer, int flags)
{
    struct iovec iov[HCD_PIECES], own = { buffer, 0 };
    int n = hcd_job_pieces(job, iov, HCD_PIECES);
    for (int i = 0; i < n && own.iov_len < HCD_DETOUR; i++) {
        if (iov[i].iov_len > HCD_DETOUR - own.iov_len)
            iov[i].iov_len = HCD_DETOUR - own.iov_len;
        if (job->kind == HCD_WRITE)
            memcpy(buffer + own.iov_len, iov[i].iov_base, iov[i].iov_len);
        own.iov_len += iov[i].iov_len;
    }
    if (job->kind == HCD_WRITE)
        return pwritev2(fd, &own, 1, (off_t)job->offset, flags);
    ssize_t got = preadv(fd, &own, 1, (off_t)job->offset);
    for (ssize_t at = 0, i = 0; at < got; i++) {
        size_t part = iov[i].iov_len < (size_t)(got - at) ? iov[i].iov_len : (size_t)(got - at);
        memcpy(iov[i].iov_base, buffer + at, part);
        at += (ssize_t)part;
    }
    return got;
}

static int hcd_job_parts(int fd, hcd_job *job, int direct, char **buffer)
{
    struct iovec iov[HCD_PIECES];
    int flags = job->kind == HCD_WRITE && job->sync ? RWF_DSYNC : 0;
    while (job->left) {
        int n = hcd_job_pieces(job, iov, HCD_PIECES);
        ssize_t got = *buffer != NULL ? hcd_job_detour(fd, job, *buffer, flags)
                      : job->kind == HCD_WRITE ? pwritev2(fd, iov, n, (off_t)job->offset, flags)
                                               : preadv(fd, iov, n, (off_t)job->offset);
        if (got > 0) {
            hcd_job_advance(job, (uint64_t)got);
        } else if (got == 0) {
            return EIO;
        } else if (errno == EOPNOTSUPP && flags) {
            flags = 0;
        } else if (errno == EINVAL && direct && *buffer == NULL) {
            int error = posix_memalign((void **)buffer, HCD_ALIGNMENT, HCD_DETOUR);
            if (error)
                return error;
        } else if (errno != EINTR) {
            return errno;
        }
    }
    if (job->kind == HCD_WRITE && job->sync && !flags && fdatasync(fd) != 0)
        return errno;
    return 0;
}

/* Whether the page cache holds all of a range of the mapping. */
static int hcd_pool_cached(const hcd_pool *pool, uint64_t offset, uint64_t length)
{
    unsigned char pages[HCD_MAPPED_MOST / 4096 + 2];
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), start = offset & ~(page - 1);
    uint64_t n = (offset + length - start + page - 1) / page;
    if (n > sizeof(pages) || mincore(pool->map + start, offset + length - start, pages) != 0)
        return 0;
    for (uint64_t i = 0; i < n; i++)
        if (!(pages[i] & 1))
            return 0;
    return 1;
}

/* A write as a copy into the page cache; whether it is done. If not, the job is as it was. */
static int hcd_job_mapped(const hcd_pool *pool, hcd_job *job)
{
    struct iovec iov[HCD_PIECES];
    uint64_t at = job->offset, left = job->left;
    if (pool->map == NULL || job->sync || left > HCD_MAPPED_MOST || at + left > pool->map_length)
        return 0;
    int n = hcd_job_pieces(job, iov, HCD_PIECES);
    for (int i = 0; i < n; i++)
        left -= iov[i].iov_len;
    if (left || !hcd_pool_cached(pool, at, job->left))
        return 0;
    for (int i = 0; i < n; i++) {
        if (pool->copy(pool->map + at, iov[i].iov_base, iov[i].iov_len) != 0)
            return 0;
        at += iov[i].iov_len;
    }
    hcd_job_advance(job, job->left);
    return 1;
}

/* As pread(2) and pwrite(2), repeated until all is moved. Nothing moved is an error: the file was cut short.
 * O_DIRECT wants memory aligned as the disk likes it, and a driver may use any: what is refused takes a detour. */
static int hcd_job_move(int fd, hcd_job *job, int direct)
{
    char *buffer = NULL;
    int error = hcd_job_parts(fd, job, direct, &buffer);
    free(buffer);
    return error;
}

static int hcd_retry_fallocate(int fd, int mode, const hcd_range_t *range)
{
    int result;
    do
        result = fallocate(fd, mode, (off_t)range->offset, (off_t)range->length);
    while (result != 0 && errno == EINTR);
    return result;
}

/* Whether errno says that the file system or the device has no such operation. */
static int hcd_unsupported(void)
{
    return errno == EOPNOTSUPP || errno == ENOSYS || errno == ENOTTY || errno == EINVAL;
}

/* Fills a range with the HCD_PATTERN bytes of `pattern`, again and again. */
static int hcd_write_over(hcd_pool *pool, const hcd_range_t *range, const char *pattern)
{
    struct iovec iov[16];
    uint64_t done = 0;
    while (done < range->length) {
        int n = 0;
        if (__atomic_load_n(&pool->stopping, __ATOMIC_ACQUIRE))
            return ECANCELED;
        for (uint64_t at = done; at < range->length && n < 16; n++) {
            uint64_t phase = at % HCD_PATTERN, part = HCD_PATTERN - phase;
            if (part > range->length - at)
                part = range->length - at;
            iov[n].iov_base = (void *)(pattern + phase);
            iov[n].iov_len = part;
            at += part;
        }
        ssize_t got = pwritev(pool->fd, iov, n, (off_t)(range->offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? errno : EIO;
        done += (uint64_t)got;
    }
    return 0;
}

/* The cheapest way that the file has: a hole where that is allowed, extents marked as zero, written zeroes. */
static int hcd_zero_range(hcd_pool *pool, const hcd_range_t *range)
{
    if (range->unmap) {
        if (hcd_retry_fallocate(pool->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, range) == 0)
            return 0;
        if (!hcd_unsupported())
            return errno;
    }
    if (pool->block_device) {
        uint64_t span[2] = {range->offset, range->length};
        if (ioctl(pool->fd, BLKZEROOUT, span) == 0)
            return 0;
    } else if (hcd_retry_fallocate(pool->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, range) == 0) {
        return 0;
    }
    if (!hcd_unsupported())
        return errno;
    return hcd_write_over(pool, range, hcd_zeroes);
}

/* Advice: where the file cannot free space, the range stays as it is. */
static int hcd_discard_range(hcd_pool *pool, const hcd_range_t *range)
{
    uint64_t span[2] = {range->offset, range->length};
    int result = pool->block_device
                     ? ioctl(pool->fd, BLKDISCARD, span)
                     : hcd_retry_fallocate(pool->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, range);
    return result == 0 || hcd_unsupported() ? 0 : errno;
}

static int hcd_job_ranges(hcd_pool *pool, hcd_job *job)
{
    for (uint32_t i = 0; i < job->n_ranges; i++) {
        if (job->ranges[i].length == 0)
            continue;
        int error = job->kind == HCD_DISCARD ? hcd_discard_range(pool, &job->ranges[i])
                    : job->kind == HCD_SAME  ? hcd_write_over(pool, &job->ranges[i], job->pattern)
                                             : hcd_zero_range(pool, &job->ranges[i]);
        if (error)
            return error;
    }
    return job->sync && fdatasync(pool->fd) != 0 ? errno : 0;
}

/* Whether the next n bytes of the request are `bytes`; the job stands behind those that are. */
static int hcd_job_matches(hcd_job *job, const char *bytes, uint64_t n)
{
    while (n) {
        uint64_t part = job->iov->iov_len - job->at;
        if (part > n)
            part = n;
        if (memcmp((const char *)job->iov->iov_base + job->at, bytes, part) != 0)
            return 0;
        hcd_job_advance(job, part);
        bytes += part;
        n -= part;
    }
    return 1;
}

static int hcd_job_compare(int fd, hcd_job *job)
{
    char *buffer;
    int error = posix_memalign((void **)&buffer, HCD_ALIGNMENT, HCD_DETOUR);
    if (error)
        return error;
    while (job->left && !error) {
        ssize_t got = pread(fd, buffer, job->left < HCD_DETOUR ? job->left : HCD_DETOUR, (off_t)job->offset);
        if (got > 0)
            error = hcd_job_matches(job, buffer, (uint64_t)got) ? 0 : HCD_DIFFERENT;
        else if (got == 0 || errno != EINTR)
            error = got ? errno : EIO;
    }
    free(buffer);
    return error;
}

static void hcd_job_run(hcd_pool *pool, hcd_job *job)
{
    if (job->kind == HCD_WRITE && hcd_job_mapped(pool, job))
        job->error = 0;
    else if (job->kind == HCD_READ || job->kind == HCD_WRITE)
        job->error = hcd_job_move(pool->fd, job, pool->direct);
    else if (job->kind == HCD_FLUSH)
        job->error = fdatasync(pool->fd) != 0 ? errno : 0;
    else if (job->kind == HCD_COMPARE)
        job->error = hcd_job_compare(pool->fd, job);
    else
        job->error = hcd_job_ranges(pool, job);
}

/* -- the pool; functions marked "locked" want its lock held */

static inline int hcd_job_line(const hcd_pool *pool, const hcd_job *job)
{
    return job->kind == HCD_WRITE && !job->sync && !pool->direct ? HCD_LINE_WRITES : HCD_LINE_ANY;
}

/* Locked. Whether a thread that looked now would find a job. */
static inline int hcd_pool_takeable(const hcd_pool *pool)
{
    return pool->lines[HCD_LINE_ANY].first != NULL || (pool->lines[HCD_LINE_WRITES].first != NULL && !pool->writing);
}

/* Locked. Moves the next job, or the next few writes, to `batch`. */
static void hcd_pool_take(hcd_pool *pool, hcd_list *batch)
{
    hcd_job *any = pool->lines[HCD_LINE_ANY].first;
    hcd_job *write = pool->writing ? NULL : pool->lines[HCD_LINE_WRITES].first;
    if (write != NULL && (any == NULL || write->seq < any->seq)) {
        pool->writing = 1;
        for (int n = 0; n < HCD_POOL_BATCH && pool->lines[HCD_LINE_WRITES].first != NULL; n++)
            hcd_list_add(batch, hcd_list_take(&pool->lines[HCD_LINE_WRITES]));
    } else if (any != NULL) {
        hcd_list_add(batch, hcd_list_take(&pool->lines[HCD_LINE_ANY]));
    }
}

/* Locked. Hands finished jobs back; whether the eventfd is to be written. */
static int hcd_pool_post(hcd_pool *pool, hcd_list *finished)
{
    int tell = pool->done.first == NULL && finished->first != NULL;
    hcd_list_move(&pool->done, finished);
    return tell;
}

static void hcd_pool_tell(hcd_pool *pool)
{
    uint64_t one = 1;
    if (write(pool->done_fd, &one, 8) != 8)
        return;                     /* full: it is readable already */
}

static void *hcd_pool_main(void *arg);

/* Locked. A thread that may be told to take the work that is left: started here, or 1: one is to be signalled. */
static int hcd_pool_help(hcd_pool *pool)
{
    sigset_t all, before;
    if (pool->stopping || !hcd_pool_takeable(pool))
        return 0;
    if (pool->idle)
        return 1;
    if (pool->started == pool->most)
        return 0;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 128 << 10);
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &all, &before);      /* signals are for Python's main thread */
    if (pthread_create(&pool->handles[pool->started], &attributes, hcd_pool_main, pool) == 0) {
        pthread_setname_np(pool->handles[pool->started], "hcd-block");
        pool->started++;
        pool->threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return 0;
}

/* Does the jobs of `batch`, handing results back early when that takes long; the last ones stay in `finished`. */
static void hcd_pool_work(hcd_pool *pool, hcd_list *batch, hcd_list *finished)
{
    uint64_t since = hcd_now();
    while (batch->first != NULL) {
        hcd_job *job = hcd_list_take(batch);
        hcd_job_run(pool, job);
        hcd_list_add(finished, job);
        if (batch->first == NULL || hcd_now() - since < HCD_POOL_TELL_NS)
            continue;
        pthread_mutex_lock(&pool->lock);
        int tell = hcd_pool_post(pool, finished);
        pthread_mutex_unlock(&pool->lock);
        if (tell)
            hcd_pool_tell(pool);
        since = hcd_now();
    }
}

static void *hcd_pool_main(void *arg)
{
    hcd_pool *pool = arg;
    hcd_list batch, finished;
    hcd_list_clear(&batch);
    hcd_list_clear(&finished);
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        hcd_pool_take(pool, &batch);
        if (batch.first == NULL) {
            if (pool->stopping)
                break;
            pool->idle++;
            pthread_cond_wait(&pool->work, &pool->lock);
            pool->idle--;
            continue;
        }
        int writes = hcd_job_line(pool, batch.first) == HCD_LINE_WRITES;
        int signal = hcd_pool_help(pool);
        pthread_mutex_unlock(&pool->lock);
        if (signal)
            pthread_cond_signal(&pool->work);
        hcd_pool_work(pool, &batch, &finished);
        pthread_mutex_lock(&pool->lock);
        if (writes)
            pool->writing = 0;
        if (hcd_pool_post(pool, &finished)) {
            pthread_mutex_unlock(&pool->lock);
            hcd_pool_tell(pool);
            pthread_mutex_lock(&pool->lock);
        }
    }
    pool->threads--;
    pthread_cond_signal(&pool->gone);
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* -- the ring; all locked */

/* Whether the ring takes the job with its next call of the kernel. */
static int hcd_ring_take(hcd_pool *pool, hcd_job *job)
{
    if (job->kind != HCD_READ && job->kind != HCD_WRITE)
        return 0;
    struct iovec *iov = hcd_uring_room(pool->ring);
    if (iov == NULL)
        return 0;
    int n = hcd_job_pieces(job, iov, HCD_URING_PIECES);
    uint64_t covered = 0;
    for (int i = 0; i < n; i++)
        covered += iov[i].iov_len;
    if (covered < job->left)
        return 0;
    int write = job->kind == HCD_WRITE;
    hcd_uring_queue(pool->ring, pool->fd, write, n, job->offset, write && job->sync ? RWF_DSYNC : 0, job);
    return 1;
}

/* Gives the ring what it takes of `batch`; the rest stays. */
static void hcd_ring_submit(hcd_pool *pool, hcd_list *batch)
{
    hcd_job *taken[HCD_URING_ENTRIES];
    unsigned n = 0;
    hcd_list rest;
    hcd_list_clear(&rest);
    while (batch->first != NULL) {
        hcd_job *job = hcd_list_take(batch);
        if (hcd_ring_take(pool, job))
            taken[n++] = job;
        else
            hcd_list_add(&rest, job);
    }
    unsigned refused = hcd_uring_submit(pool->ring);
    for (unsigned i = n - refused; i < n; i++)
        hcd_list_add(&rest, taken[i]);
    pool->ring_jobs += n - refused;
    hcd_list_move(batch, &rest);
}

/* What came back whole goes to `done`, the others to `rest`, advanced by what was moved. */
static void hcd_ring_reap(hcd_pool *pool, hcd_list *done, hcd_list *rest)
{
    int result;
    hcd_job *job;
    while ((job = hcd_uring_reap(pool->ring, &result)) != NULL) {
        if (result > 0)
            hcd_job_advance(job, (uint64_t)result);
        pool->ring_rest += job->left != 0;
        hcd_list_add(job->left ? rest : done, job);
    }
}

/* Waits until the kernel has given everything back, or for `until`; whether it has. What is not whole is cancelled. */
static int hcd_ring_drain(hcd_pool *pool, const struct timespec *until)
{
    while (pool->ring != NULL && pool->ring->with_kernel) {
        hcd_list rest;
        hcd_list_clear(&rest);
        hcd_ring_reap(pool, &pool->done, &rest);
        for (hcd_job *job = rest.first; job != NULL; job = job->next)
            job->error = ECANCELED;
        hcd_list_move(&pool->done, &rest);
        if (!pool->ring->with_kernel)
            break;
        struct pollfd one = { pool->ring->fd, POLLIN, 0 };
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        long ms = (until->tv_sec - now.tv_sec) * 1000 + (until->tv_nsec - now.tv_nsec) / 1000000;
        if (ms <= 0)
            return 0;
        poll(&one, 1, (int)ms);
    }
    return 1;
}

/* -- what the file calls */

/* NULL with errno when it cannot be had. `fd` stays the caller's. */
static hcd_pool *hcd_pool_new(int fd, int block_device, int most, int ring)
{
    hcd_pool *pool = calloc(1, sizeof(*pool));
    pthread_condattr_t attributes;
    if (pool == NULL)
        return NULL;
    pool->done_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (pool->done_fd < 0) {
        free(pool);
        return NULL;
    }
    pthread_mutex_init(&pool->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&pool->work, &attributes);
    pthread_cond_init(&pool->gone, &attributes);
    pthread_condattr_destroy(&attributes);
    for (int i = 0; i < HCD_LINES; i++)
        hcd_list_clear(&pool->lines[i]);
    hcd_list_clear(&pool->done);
    pool->fd = fd;
    pool->block_device = block_device;
    pool->direct = (fcntl(fd, F_GETFL) & O_DIRECT) != 0;
    pool->most = most;
    if (pool->direct && ring)
        pool->ring = hcd_uring_new(pool->done_fd);
    return pool;
}

/* Before the first job: map the file, if it can be mapped. */
static void hcd_pool_map(hcd_pool *pool, uint64_t length, int (*copy)(void *, const void *, size_t))
{
    if (pool->direct || pool->block_device || length == 0)
        return;
    void *p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, pool->fd, 0);
    if (p == MAP_FAILED)
        return;
    madvise(p, length, MADV_DONTDUMP);
    madvise(p, length, MADV_RANDOM);
    pool->map = p;
    pool->map_length = length;
    pool->copy = copy;
}

/* Locked. Fails every job that no thread has begun. */
static void hcd_pool_cancel(hcd_pool *pool, int error)
{
    for (int i = 0; i < HCD_LINES; i++) {
        for (hcd_job *job = pool->lines[i].first; job != NULL; job = job->next)
            job->error = error;
        hcd_list_move(&pool->done, &pool->lines[i]);
    }
}

/* Locked. Puts the jobs of `batch` into the lines of the threads; whether a thread, and whether the file, is to be told. */
static int hcd_pool_line_up(hcd_pool *pool, hcd_list *batch, int *tell)
{
    while (batch->first != NULL) {
        hcd_job *job = hcd_list_take(batch);
        job->seq = pool->seq++;
        hcd_list_add(&pool->lines[hcd_job_line(pool, job)], job);
    }
    int signal = hcd_pool_help(pool);
    if (pool->threads == 0 || pool->stopping) {       /* no thread could be started, or none will be */
        *tell = pool->done.first == NULL;
        hcd_pool_cancel(pool, pool->stopping ? ECANCELED : EAGAIN);
    }
    return signal;
}

/* Takes the jobs of `batch` over. */
static void hcd_pool_submit(hcd_pool *pool, hcd_list *batch)
{
    int signal = 0, tell = 0;
    pthread_mutex_lock(&pool->lock);
    if (pool->ring != NULL && !pool->stopping)
        hcd_ring_submit(pool, batch);
    if (batch->first != NULL)
        signal = hcd_pool_line_up(pool, batch, &tell);
    pthread_mutex_unlock(&pool->lock);
    if (signal)
        pthread_cond_signal(&pool->work);
    if (tell)
        hcd_pool_tell(pool);
}

/* All that finished since the last call, linked by `next`. */
static hcd_job *hcd_pool_finished(hcd_pool *pool)
{
    hcd_job *jobs;
    int signal = 0, tell = 0;
    hcd_list rest;
    hcd_list_clear(&rest);
    pthread_mutex_lock(&pool->lock);
    if (pool->ring != NULL) {
        hcd_ring_reap(pool, &pool->done, &rest);
        if (rest.first != NULL)
            signal = hcd_pool_line_up(pool, &rest, &tell);      /* no need to tell: they are taken here */
    }
    jobs = pool->done.first;
    hcd_list_clear(&pool->done);
    pthread_mutex_unlock(&pool->lock);
    if (signal)
        pthread_cond_signal(&pool->work);
    return jobs;
}

/* Cancels what has not begun, and waits up to `ms` for what has. Whether all threads have ended. */
static int hcd_pool_stop(hcd_pool *pool, long ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += ms / 1000;
    until.tv_nsec += ms % 1000 * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    pthread_mutex_lock(&pool->lock);
    __atomic_store_n(&pool->stopping, 1, __ATOMIC_RELEASE);
    hcd_pool_cancel(pool, ECANCELED);
    pthread_cond_broadcast(&pool->work);
    while (pool->threads && pthread_cond_timedwait(&pool->gone, &pool->lock, &until) == 0)
        ;
    int ended = hcd_ring_drain(pool, &until) && pool->threads == 0;
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; ended && i < pool->started; i++)
        pthread_join(pool->handles[i], NULL);
    if (ended)
        pool->started = 0;
    return ended;
}

/* After hcd_pool_stop said yes. */
static void hcd_pool_free(hcd_pool *pool)
{
    hcd_uring_free(pool->ring);
    close(pool->done_fd);
    if (pool->map != NULL)
        munmap(pool->map, pool->map_length);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->gone);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

#endif
