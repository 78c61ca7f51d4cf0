// The best that this machine can do without the library: copies of random rows in memory, and reads
// of random pages of a file. Each call starts its threads, lets them begin together and returns the
// seconds that they took; a negative result is an errno. Compiled by bench/probe.py.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define MOST_THREADS 256
#define MOST_AHEAD 64
#define LINE 64
#define STAGED 8 // rows that together fill whole lines
#define MOST_ROW 512

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

typedef struct {
    void (*work)(void *context, int thread);
    void *context;
    int thread;
    pthread_barrier_t *start;
} Worker;

static void *worker_main(void *argument) {
    Worker *worker = argument;
    pthread_barrier_wait(worker->start);
    worker->work(worker->context, worker->thread);
    return NULL;
}

static double run(int threads, void (*work)(void *, int), void *context) {
    static Worker workers[MOST_THREADS];
    pthread_t handles[MOST_THREADS];
    pthread_barrier_t start;
    if (threads < 1 || threads > MOST_THREADS) return -EINVAL;
    pthread_barrier_init(&start, NULL, threads);
    for (int i = 1; i < threads; i++) {
        workers[i] = (Worker){work, context, i, &start};
        // The others wait for this thread at the barrier.
        if (pthread_create(&handles[i], NULL, worker_main, &workers[i])) abort();
    }
    pthread_barrier_wait(&start);
    const double begun = now();
    work(context, 0);
    for (int i = 1; i < threads; i++) pthread_join(handles[i], NULL);
    const double taken = now() - begun;
    pthread_barrier_destroy(&start);
    return taken;
}

// Copies rows `ids` of a table to `out`. Each thread copies its share, call_rows at a time, to the
// same place.
typedef struct {
    const uint8_t *table;
    const int64_t *ids;
    int64_t count, row_bytes, call_rows;
    uint8_t *out;
    int threads, ahead, stream;
} Gather;

static inline __attribute__((always_inline)) void fetch(const uint8_t *row, int64_t size) {
    for (int64_t at = 0; at < size; at += LINE) __builtin_prefetch(row + at);
    if (size % LINE) __builtin_prefetch(row + size - 1);
}

// Writes whole lines past the caches.
static inline __attribute__((always_inline)) void put_lines(uint8_t *to, const uint8_t *from,
                                                            int64_t size) {
#if defined(__AVX__)
    for (int64_t at = 0; at < size; at += 32)
        _mm256_stream_si256((__m256i *)(to + at),
                            _mm256_loadu_si256((const __m256i *)(from + at)));
#elif defined(__SSE2__)
    for (int64_t at = 0; at < size; at += 16)
        _mm_stream_si128((__m128i *)(to + at), _mm_loadu_si128((const __m128i *)(from + at)));
#else
    memcpy(to, from, size);
#endif
}

// Inlined, so that `size` is a constant.
static inline __attribute__((always_inline)) void copy_rows(const Gather *g, const int64_t *ids,
                                                            int64_t count, uint8_t *out,
                                                            int64_t size) {
    uint8_t staged[STAGED * MOST_ROW] __attribute__((aligned(LINE)));
    for (int64_t i = 0; i < g->ahead && i < count; i++) fetch(g->table + ids[i] * size, size);
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *row = g->table + ids[i] * size;
        if (i + g->ahead < count) fetch(g->table + ids[i + g->ahead] * size, size);
        if (!g->stream) {
            memcpy(out + i * size, row, size);
        } else if (size % LINE == 0) {
            put_lines(out + i * size, row, size);
        } else {
            memcpy(staged + i % STAGED * size, row, size);
            if (i % STAGED == STAGED - 1)
                put_lines(out + (i - i % STAGED) * size, staged, STAGED * size);
        }
    }
    if (g->stream && size % LINE)
        memcpy(out + (count - count % STAGED) * size, staged, count % STAGED * size);
#if defined(__SSE2__)
    if (g->stream) _mm_sfence();
#endif
}

static void gather_share(void *context, int thread) {
    const Gather *g = context;
    const int64_t share = g->count / g->threads, first = share * thread;
    uint8_t *out = g->out + (g->call_rows < share ? g->call_rows * thread : first) * g->row_bytes;
    for (int64_t done = 0; done < share; done += g->call_rows) {
        const int64_t *ids = g->ids + first + done;
        const int64_t count = share - done < g->call_rows ? share - done : g->call_rows;
        switch (g->row_bytes) {
        case 64: copy_rows(g, ids, count, out, 64); break;
        case 128: copy_rows(g, ids, count, out, 128); break;
        case 256: copy_rows(g, ids, count, out, 256); break;
        case 264: copy_rows(g, ids, count, out, 264); break;
        case 512: copy_rows(g, ids, count, out, 512); break;
        }
    }
}

// `count` is a multiple of threads * STAGED, call_rows one of STAGED; `out` begins with a line.
double probe_gather(const uint8_t *table, const int64_t *ids, int64_t count, int64_t row_bytes,
                    int64_t call_rows, uint8_t *out, int threads, int ahead, int stream) {
    const int known = row_bytes == 64 || row_bytes == 128 || row_bytes == 256 || row_bytes == 264 ||
                      row_bytes == 512;
    if (!known || threads < 1 || ahead > MOST_AHEAD || call_rows < 1) return -EINVAL;
    if (call_rows % STAGED || (uintptr_t)out % LINE || count % (threads * STAGED)) return -EINVAL;
    Gather call = {table, ids, count, row_bytes, call_rows, out, threads, ahead, stream};
    return run(threads, gather_share, &call);
}

static volatile uint64_t sink; // so that what is read counts

// Copies rows of several tables, `count` of each, all on their way at once. row_bytes: of all.
double probe_few(const uint8_t *const *tables, const int64_t *ids, int tables_count, int64_t count,
                 int64_t row_bytes, uint8_t *out) {
    const double begun = now();
    for (int t = 0; t < tables_count; t++)
        for (int64_t i = 0; i < count; i++)
            fetch(tables[t] + ids[t * count + i] * row_bytes, row_bytes);
    for (int t = 0; t < tables_count; t++)
        for (int64_t i = 0; i < count; i++, out += row_bytes)
            memcpy(out, tables[t] + ids[t * count + i] * row_bytes, row_bytes);
    return now() - begun;
}

// Reads memory once: the sum of its 8-byte words. ahead: bytes that are fetched ahead, 0 = none.
double probe_stream(const uint8_t *from, int64_t size, int64_t ahead) {
    typedef uint64_t Words __attribute__((vector_size(LINE), aligned(1), may_alias));
    const double begun = now();
    Words sums[4] = {};
    for (int64_t at = 0; at + 4 * LINE <= size; at += 4 * LINE)
        for (int i = 0; i < 4; i++) {
            if (ahead) __builtin_prefetch(from + at + i * LINE + ahead);
            sums[i] += *(const Words *)(from + at + i * LINE);
        }
    const Words sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int i = 0; i < LINE / 8; i++) sink += sum[i];
    return now() - begun;
}

// `count` reads of `size` bytes, `depth` of them at a time.
typedef struct {
    const int *files;
    const int64_t *offsets;
    int64_t count, size;
    atomic_llong next;
    atomic_int failed; // an errno
} Reads;

static void read_share(void *context, int thread) {
    Reads *reads = context;
    void *page;
    (void)thread;
    if (posix_memalign(&page, 4096, reads->size)) {
        reads->failed = ENOMEM;
        return;
    }
    for (int64_t i; (i = atomic_fetch_add(&reads->next, 1)) < reads->count;) {
        const ssize_t found = pread(reads->files[i], page, reads->size, reads->offsets[i]);
        if (found != reads->size) reads->failed = found < 0 ? errno : EIO;
    }
    free(page);
}

double probe_pread(const int *files, const int64_t *offsets, int64_t count, int64_t size,
                   int depth) {
    Reads reads = {.files = files, .offsets = offsets, .count = count, .size = size};
    const double taken = run(depth, read_share, &reads);
    return reads.failed ? -reads.failed : taken;
}

// Returns how many pages of a file are in the page cache; a negative result is an errno.
int64_t probe_resident(int file, int64_t size) {
    const int64_t page = sysconf(_SC_PAGESIZE), pages = (size + page - 1) / page;
    unsigned char *there = malloc(pages);
    void *memory = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0);
    int64_t found = 0;
    if (!there || memory == MAP_FAILED || mincore(memory, size, there)) found = -errno;
    else
        for (int64_t i = 0; i < pages; i++) found += there[i] & 1;
    if (memory != MAP_FAILED) munmap(memory, size);
    free(there);
    return found;
}

// Maps the same part of several files, one after the other in memory. Offset and size are whole
// pages. Returns NULL and sets errno if the system refuses.
uint8_t *probe_map(const int *files, int64_t count, int64_t offset, int64_t size) {
    const int anonymous = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    uint8_t *memory = mmap(NULL, count * size, PROT_NONE, anonymous, -1, 0);
    if (memory == MAP_FAILED) return NULL;
    for (int64_t i = 0; i < count; i++) {
        uint8_t *to = memory + i * size;
        const int shared = MAP_SHARED | MAP_FIXED;
        if (mmap(to, size, PROT_READ, shared, files[i], offset) == MAP_FAILED) return NULL;
    }
    return memory;
}

int probe_unmap(uint8_t *memory, int64_t size) { return munmap(memory, size); }

// Adds a number to all values of the rows `ids` of two tables, which are read and written in place.
typedef struct {
    float *tables[2];
    int64_t widths[2]; // values of a row
    const int64_t *ids;
    int64_t count;
    float number;
} Update;

static void update_share(void *context, int thread) {
    const Update *u = context;
    enum { ahead = 8 };
    (void)thread;
    for (int64_t i = 0; i < u->count + ahead; i++)
        for (int t = 0; t < 2; t++) {
            const int64_t width = u->widths[t];
            if (i < u->count)
                fetch((const uint8_t *)(u->tables[t] + u->ids[i] * width), width * 4);
            if (i < ahead) continue;
            float *row = u->tables[t] + u->ids[i - ahead] * width;
            for (int64_t k = 0; k < width; k++) row[k] += u->number;
        }
}

// One thread. Ids are distinct and ascend.
double probe_update(float *rows, int64_t row_width, float *moments, int64_t moment_width,
                    const int64_t *ids, int64_t count, float number) {
    Update call = {{rows, moments}, {row_width, moment_width}, ids, count, number};
    return run(1, update_share, &call);
}

// Sorts ids with their positions, by two digits of so many bits. keys, sorted: [count], a key is
// id << 32 | position.
double probe_sort(const int64_t *ids, int64_t count, int digit, uint64_t *keys, uint64_t *sorted) {
    enum { most = 1 << 12 };
    static int64_t places[2][most];
    const int64_t mask = (1 << digit) - 1;
    if (digit < 1 || mask >= most) return -EINVAL;
    const double begun = now();
    memset(places, 0, sizeof(places));
    for (int64_t i = 0; i < count; i++)
        for (int pass = 0; pass < 2; pass++) places[pass][ids[i] >> pass * digit & mask]++;
    for (int pass = 0; pass < 2; pass++) {
        uint64_t *const to = pass ? sorted : keys;
        int64_t sum = 0;
        for (int64_t value = 0; value <= mask; value++) {
            const int64_t number = places[pass][value];
            places[pass][value] = sum;
            __builtin_prefetch(to + sum, 1);
            sum += number;
        }
        for (int64_t i = 0; i < count; i++) {
            const uint64_t key = pass ? keys[i] : (uint64_t)ids[i] << 32 | i;
            uint64_t *const at = to + places[pass][key >> (32 + pass * digit) & mask]++;
            __builtin_prefetch(at + LINE / 8, 1);
            *at = key;
        }
    }
    return now() - begun;
}

// Reads float32 values once, whole lines, and looks whether all are finite; -EDOM if not.
double probe_finite(const float *values, int64_t lines) {
    typedef int32_t Ints __attribute__((vector_size(LINE), aligned(1), may_alias));
    enum { ahead = 64 };
    const double begun = now();
    Ints most = {0};
    for (int64_t i = 0; i < lines; i++) {
        __builtin_prefetch((const char *)((const Ints *)values + i) + ahead * LINE);
        const Ints size = ((const Ints *)values)[i] & 0x7fffffff;
        const Ints above = size > most;
        most = (size & above) | (most & ~above);
    }
    for (int i = 0; i < LINE / 4; i++)
        if (most[i] >= 0x7f800000) return -EDOM;
    return now() - begun;
}

// Rows `ids` of a table, each of which becomes a row of `out_bytes`: its own bytes, or whole lines
// that repeat them, as many as its numbers take. `second`: prefetch to the second level of the
// caches. Otherwise as in probe_gather.
typedef struct {
    const uint8_t *table;
    const int64_t *ids;
    int64_t count, row_bytes, out_bytes;
    uint8_t *out;
    int threads, ahead, second, stream;
} Widen;

typedef char Line __attribute__((vector_size(LINE), aligned(1), may_alias));

static inline __attribute__((always_inline)) void fetch_second(const uint8_t *row, int64_t size) {
    for (int64_t at = 0; at < size; at += LINE) __builtin_prefetch(row + at, 0, 2);
    if (size % LINE) __builtin_prefetch(row + size - 1, 0, 2);
}

static inline __attribute__((always_inline)) void put_line(uint8_t *to, Line line, int stream) {
    if (stream) put_lines(to, (const uint8_t *)&line, LINE);
    else *(Line *)to = line;
}

// Inlined, so that sizes are constants.
static inline __attribute__((always_inline)) void widen_row(uint8_t *to, const uint8_t *row,
                                                            int64_t size, int64_t out_size,
                                                            int stream) {
    Line part = {0};
    if (out_size % LINE) {
        memcpy(to, row, size);
        return;
    }
    if (size < LINE) memcpy(&part, row, size);
    for (int64_t at = 0, from = 0; at < out_size; at += LINE, from += LINE) {
        if (from >= size) from = 0;
        if (size >= LINE) part = *(const Line *)(row + (from + LINE <= size ? from : size - LINE));
        put_line(to + at, part, stream);
    }
}

static inline __attribute__((always_inline)) void widen_rows(const Widen *w, int64_t first,
                                                             int64_t last, int64_t size,
                                                             int64_t out_size, int stream) {
    const int64_t *ids = w->ids;
    for (int64_t i = first; i < last + w->ahead; i++) {
        if (i < last) {
            const uint8_t *row = w->table + ids[i] * size;
            if (w->second) fetch_second(row, size);
            else fetch(row, size);
        }
        const int64_t j = i - w->ahead;
        if (j < first) continue;
        uint8_t *to = w->out + j * out_size;
        if (!stream && j + 1 < last)
            for (int64_t at = 0; at < out_size; at += LINE)
                __builtin_prefetch(to + out_size + at, 1);
        widen_row(to, w->table + ids[j] * size, size, out_size, stream);
    }
#if defined(__SSE2__)
    if (stream) _mm_sfence();
#endif
}

#define WIDENINGS(X)                                                                            \
    X(34, 34) X(34, 128) X(34, 256) X(64, 64) X(66, 66) X(66, 128) X(66, 256) X(66, 512)        \
    X(128, 128) X(130, 130) X(130, 256) X(130, 512) X(130, 1024) X(132, 132) X(132, 256)        \
    X(132, 512) X(256, 256) X(258, 258) X(258, 512) X(258, 1024) X(264, 264) X(264, 512)        \
    X(264, 1024) X(512, 512)

static void widen_share(void *context, int thread) {
    const Widen *w = context;
    const int64_t first = w->count * thread / w->threads;
    const int64_t last = w->count * (thread + 1) / w->threads;
#define WIDENING(size, out_size)                                              \
    if (w->row_bytes == size && w->out_bytes == out_size) {                   \
        if (w->stream) widen_rows(w, first, last, size, out_size, 1);         \
        else widen_rows(w, first, last, size, out_size, 0);                   \
    }
    WIDENINGS(WIDENING)
#undef WIDENING
}

// `out` begins with a line.
double probe_widen(const uint8_t *table, const int64_t *ids, int64_t count, int64_t row_bytes,
                   int64_t out_bytes, uint8_t *out, int threads, int ahead, int second,
                   int stream) {
    int known = 0;
#define WIDENING(size, out_size) known |= row_bytes == size && out_bytes == out_size;
    WIDENINGS(WIDENING)
#undef WIDENING
    if (!known || threads < 1 || ahead < 0 || (uintptr_t)out % LINE) return -EINVAL;
    Widen call = {table, ids, count, row_bytes, out_bytes, out, threads, ahead, second, stream};
    return run(threads, widen_share, &call);
}

// Keeps this thread busy for so long.
void probe_spin(double seconds) {
    for (const double end = now() + seconds; now() < end;) {}
}

// Chains of random loads: `levels` from a small table (for `more` of 256 items one more), then one
// from a large table. Each load's address comes from the load before; items do not wait for each
// other.
double probe_chase(const uint32_t *small, int64_t small_size, const uint32_t *large,
                   int64_t large_size, const uint32_t *starts, int64_t count, int levels, int more,
                   uint32_t *out) {
    const double begun = now();
    for (int64_t i = 0; i < count; i++) {
        uint32_t x = starts[i];
        const int loads = levels + ((int)(x & 255) < more);
        for (int d = 0; d < loads; d++) x = small[(uint64_t)x * (uint64_t)small_size >> 32];
        out[i] = large[(uint64_t)x * (uint64_t)large_size >> 32];
    }
    return now() - begun;
}
