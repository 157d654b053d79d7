// Attention of one new token over a cache of keys and values: what a model does in each layer while it generates. Called by
// deepspeed/kernels/native_attention.py.
//
// A cache is cut into chunks of kChunk positions. Each is read once for all heads that share it, and leaves its largest score, the
// sum of its weights and its mean of values; these are put together in the order of the chunks, so results depend neither on
// threads nor on the instruction set. After arXiv:2205.14135 (sums by parts).

#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "native.h"
#include "threads.h"

namespace {

constexpr int kBytes = 4;  // int8 with a scale per position, beside the values of Precision

constexpr int64_t kAskedBytes = 32768;

// What loops over positions are called for: the last ones count for nothing.
size_t padded_of(size_t n) { return (n + 15) / 16 * 16; }

struct Cache {
    const char* at;
    const float* scales;  // of int8
    int64_t of_batch, of_head, of_row;              // strides in elements
    int64_t scale_of_batch, scale_of_head, scale_of_row;
};

// Queries beside integers: 15 bits, and a scale for each head.
struct Words {
    std::vector<int16_t> queries;
    std::vector<float> factors;

    void fill(const AttentionLoops& loops, const float* from, int64_t heads, int64_t dim, float factor) {
        queries.resize(heads * dim);
        factors.resize(heads);
        for (int64_t h = 0; h < heads; ++h) factors[h] = factor * loops.to_words(from + h * dim, dim, queries.data() + h * dim);
    }
};

// Queries beside bfloat16: as they are where they are bfloat16 themselves and an instruction takes them, else in 16 bits and in the
// order that the loops want.
struct Shorts {
    std::vector<uint16_t> whole;
    std::vector<float> gathered;
    bool are_whole;

    void fill(const AttentionLoops& loops, const float* from, int64_t heads, int64_t dim) {
        const int64_t numel = heads * dim, padded = (dim + 31) / 32 * 32;
        whole.resize(numel);
        uint32_t rest = 0;
        for (int64_t i = 0; i < numel; ++i) {
            uint32_t bits;
            std::memcpy(&bits, from + i, sizeof bits);
            whole[i] = static_cast<uint16_t>(bits >> 16);
            rest |= bits;
        }
        are_whole = loops.score_short && (rest & 0xffff) == 0;
        if (are_whole) return;
        gathered.resize(heads * padded);
        for (int64_t h = 0; h < heads; ++h) loops.gather(from + h * dim, dim, gathered.data() + h * padded);
        loops.shorten(gathered.data(), heads * padded);
    }
};

// Weights beside values of int8: 15 bits, and a scale for each head.
struct Rounded {
    std::vector<int16_t> weights;
    std::vector<int32_t> sums;  // of a chunk's values
    std::vector<float> factors;

    void fit(int64_t heads) {
        weights.resize(heads * kChunk);
        factors.resize(heads);
    }
};

struct Attention {
    const AttentionLoops& loops;
    int dtype;
    bool is_short;         // queries are bfloat16 themselves, and so are weights beside bfloat16
    const float* queries;  // [batch, heads, dim]
    float factor;          // of scores
    Cache keys, values;
    const int64_t* ranges;  // [batch, 2]: the first position and the one after the last
    const float* bias;      // added to scores; strides of batch, head and position in elements
    int64_t bias_of_batch, bias_of_head, bias_of_row;
    float* out;  // [batch, heads, dim]
    int64_t num_shared, heads, dim, num_chunks;  // heads: those that share one of the cache's `num_shared`
    const Words& words;
    const Shorts& shorts;
    float *tops, *sums, *parts;  // of every chunk: [batch, num_shared, num_chunks, heads (, dim)]

    bool mixes_short() const { return dtype == kBFloat16 && is_short && loops.mix_short; }
    int64_t nbytes() const { return dtype == kFloat32 ? 4 : dtype == kBFloat16 ? 2 : 1; }
    const char* row(const Cache& cache, int64_t b, int64_t shared, int64_t position) const {
        return cache.at + (b * cache.of_batch + shared * cache.of_head + position * cache.of_row) * nbytes();
    }
    const float* scale(const Cache& cache, int64_t b, int64_t shared, int64_t position) const {
        return cache.scales + b * cache.scale_of_batch + shared * cache.scale_of_head + position * cache.scale_of_row;
    }

    void gather_scales(const Cache& cache, int64_t b, int64_t shared, int64_t first, size_t n, float* to) const;
    void score(int64_t b, int64_t shared, int64_t first, size_t n, float* scores) const;
    void ask_for_scales(const Cache& cache, int64_t b, int64_t shared, int64_t first, size_t n) const;
    void ask_for_values(int64_t b, int64_t shared, int64_t first, size_t n) const;
    void weigh(int64_t b, int64_t shared, int64_t first, size_t n, float* scores, Rounded& rounded, float* top, float* sum) const;
    void mix(int64_t b, int64_t shared, int64_t first, size_t n, const float* weights, Rounded& rounded, float* part) const;
    void chunk(int64_t index) const;
    void combine(int64_t index) const;
};

// The scales of n positions side by side, zeros up to a multiple of 16.
void Attention::gather_scales(const Cache& cache, int64_t b, int64_t shared, int64_t first, size_t n, float* to) const {
    if (cache.scale_of_row == 1)
        std::memcpy(to, scale(cache, b, shared, first), n * sizeof *to);
    else
        for (size_t i = 0; i < n; ++i) to[i] = *scale(cache, b, shared, first + static_cast<int64_t>(i));
    for (size_t i = n; i % 16; ++i) to[i] = 0;
}

void Attention::score(int64_t b, int64_t shared, int64_t first, size_t n, float* scores) const {
    const char* at = row(keys, b, shared, first);
    const int64_t head0 = (b * num_shared + shared) * heads;
    if (dtype == kFloat32) {
        loops.score[0](at, keys.of_row, n, dim, queries + head0 * dim, heads, factor, scores, loops.cache);
    } else if (dtype == kBFloat16 && shorts.are_whole) {
        loops.score_short(reinterpret_cast<const uint16_t*>(at), keys.of_row, n, dim, shorts.whole.data() + head0 * dim, heads, factor, scores,
                          loops.cache);
    } else if (dtype == kBFloat16) {
        loops.score[1](at, keys.of_row, n, dim, shorts.gathered.data() + head0 * ((dim + 31) / 32 * 32), heads, factor, scores, loops.cache);
    } else {
        static thread_local std::vector<int32_t> sums;
        float scales[kChunk];
        sums.resize(heads * kChunk);
        const float* const factors = words.factors.data() + head0;
        gather_scales(keys, b, shared, first, n, scales);
        ask_for_scales(values, b, shared, first, n);
        loops.score_bytes(reinterpret_cast<const int8_t*>(at), keys.of_row, n, dim, words.queries.data() + head0 * dim, heads, sums.data(),
                          loops.cache);
        for (int64_t h = 0; h < heads; ++h)
            loops.scale_sums(sums.data() + h * kChunk, scales, factors[h], padded_of(n), scores + h * kChunk);
    }
    if (!bias) return;
    for (int64_t h = 0; h < heads; ++h) {
        const float* added = bias + b * bias_of_batch + (shared * heads + h) * bias_of_head;
        for (size_t i = 0; i < n; ++i) scores[h * kChunk + i] += added[(first + static_cast<int64_t>(i)) * bias_of_row];
    }
}

// They are wanted all at once: read by themselves they would be waited for.
void Attention::ask_for_scales(const Cache& cache, int64_t b, int64_t shared, int64_t first, size_t n) const {
    if (cache.scale_of_row != 1) return;
    for (size_t i = 0; i < n; i += 16) __builtin_prefetch(scale(cache, b, shared, first) + i);
}

// What mix begins with: it comes while weights are made of scores.
void Attention::ask_for_values(int64_t b, int64_t shared, int64_t first, size_t n) const {
    const int64_t in_row = dim * nbytes(), all = static_cast<int64_t>(n), some = kAskedBytes / in_row;
    for (int64_t i = 0; i < (some < all ? some : all); ++i) {
        const char* at = row(values, b, shared, first + i);
        for (int64_t byte = 0; byte < in_row; byte += 64) loops.cache == 1 ? __builtin_prefetch(at + byte, 0, 3) : __builtin_prefetch(at + byte, 0, 2);
    }
}

// Scores become weights; those of int8 are multiplied with the scales of their values, and rounded.
void Attention::weigh(int64_t b, int64_t shared, int64_t first, size_t n, float* scores, Rounded& rounded, float* top, float* sum) const {
    const size_t padded = padded_of(n);
    float scales[kChunk];
    if (dtype == kBytes) {
        rounded.fit(heads);
        gather_scales(values, b, shared, first, n, scales);
        if (first + kChunk < ranges[2 * b + 1]) ask_for_scales(keys, b, shared, first + kChunk, n);
    }
    for (int64_t h = 0; h < heads; ++h) {
        float* mine = scores + h * kChunk;
        for (size_t i = n; i < padded; ++i) mine[i] = -INFINITY;
        top[h] = loops.largest(mine, padded);
        const float distance = top[h] == -INFINITY ? 0 : top[h];  // nothing seen: all weights are 0
        if (dtype == kBytes)
            rounded.factors[h] = loops.weigh_words(mine, scales, padded, distance, rounded.weights.data() + h * kChunk, &sum[h]);
        else
            sum[h] = loops.weigh[dtype == kFloat32 ? 0 : is_short ? 2 : 1](mine, padded, distance);
    }
}

void Attention::mix(int64_t b, int64_t shared, int64_t first, size_t n, const float* weights, Rounded& rounded, float* part) const {
    const char* at = row(values, b, shared, first);
    if (dtype != kBytes) {
        for (int64_t i = 0; i < heads * dim; ++i) part[i] = 0;
        const auto loop = mixes_short() ? loops.mix_short : loops.mix[dtype - kFloat32];
        loop(at, values.of_row, n, dim, weights, heads, part, loops.cache);
        return;
    }
    rounded.sums.assign(heads * dim, 0);
    const int32_t* sums = rounded.sums.data();
    loops.mix_bytes(reinterpret_cast<const int8_t*>(at), values.of_row, n, dim, rounded.weights.data(), heads, rounded.sums.data(),
                    loops.cache);
    for (int64_t h = 0; h < heads; ++h) loops.to_floats(sums + h * dim, rounded.factors[h], static_cast<size_t>(dim), part + h * dim);
}

void Attention::chunk(int64_t index) const {
    static thread_local std::vector<float> scores;
    static thread_local Rounded rounded;
    const int64_t shared = index / num_chunks % num_shared, b = index / num_chunks / num_shared;
    const int64_t start = ranges[2 * b] + index % num_chunks * kChunk, stop = ranges[2 * b + 1];
    float *top = tops + index * heads, *sum = sums + index * heads;
    for (int64_t h = 0; h < heads; ++h) top[h] = -INFINITY, sum[h] = 0;
    if (start >= stop) return;
    const size_t n = static_cast<size_t>(stop - start < kChunk ? stop - start : kChunk);
    scores.resize(heads * kChunk);
    score(b, shared, start, n, scores.data());
    ask_for_values(b, shared, start, n);
    weigh(b, shared, start, n, scores.data(), rounded, top, sum);
    mix(b, shared, start, n, scores.data(), rounded, parts + index * heads * dim);
}

void Attention::combine(int64_t index) const {
    const int64_t chunk0 = index * num_chunks;
    for (int64_t h = 0; h < heads; ++h) {
        float* to = out + (index * heads + h) * dim;
        for (int64_t d = 0; d < dim; ++d) to[d] = 0;
        float top = -INFINITY, total = 0;
        for (int64_t c = chunk0; c < chunk0 + num_chunks; ++c) {
            const float mine = tops[c * heads + h];
            top = mine > top || mine != mine ? mine : top;
        }
        if (top == -INFINITY) continue;
        for (int64_t c = chunk0; c < chunk0 + num_chunks; ++c) {
            if (tops[c * heads + h] == -INFINITY) continue;
            float weight[16] = {tops[c * heads + h]};
            loops.weigh[0](weight, 16, top);
            total += weight[0] * sums[c * heads + h];
            loops.add_scaled(parts + (c * heads + h) * dim, weight[0], static_cast<size_t>(dim), to);
        }
        for (int64_t d = 0; d < dim; ++d) to[d] /= total;
        if (dtype == kBFloat16) (mixes_short() ? loops.spread_short : loops.spread)(to, static_cast<size_t>(dim));
    }
}

}  // namespace

// out [batch, num_shared * heads, dim] = softmax(factor queries keys^T + bias) values, over positions [ranges[b][0], ranges[b][1]) of a
// cache [batch, num_shared, positions, dim]. `queries` [batch, num_shared * heads, dim]. dtype: a
// Precision (not fp16), or 4 for int8 with `key_scales` and `value_scales` per position; query_dtype: that of the caller's queries, which
// says how weights beside bfloat16 are rounded. dim is a multiple of 16, at most 512.
// strides: of batch, head and position for keys, values, their scales and the bias, 15 in all. Where all scores are -inf, out is 0.
DS_API void ds_decode_attention(const float* queries, float factor, const void* keys, const void* values, const float* key_scales,
                                const float* value_scales, const float* bias, const int64_t* ranges, const int64_t* strides,
                                float* out, int dtype, int query_dtype, int64_t batch, int64_t num_shared, int64_t heads, int64_t dim,
                                int num_threads) {
    const auto cache = [&](const void* at, const float* scales, const int64_t* of, const int64_t* of_scales) {
        return Cache{static_cast<const char*>(at), scales, of[0], of[1], of[2], of_scales[0], of_scales[1], of_scales[2]};
    };
    int64_t longest = 1;
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t length = ranges[2 * b + 1] - ranges[2 * b];
        longest = length > longest ? length : longest;
    }
    const int64_t num_chunks = (longest + kChunk - 1) / kChunk, num_parts = batch * num_shared * num_chunks;
    static thread_local std::vector<float> held;
    static thread_local Words words;
    held.resize(num_parts * heads * (dim + 2));
    static thread_local Shorts shorts;
    if (dtype == kBytes) words.fill(current_kernels().attention, queries, batch * num_shared * heads, dim, factor);
    if (dtype == kBFloat16) shorts.fill(current_kernels().attention, queries, batch * num_shared * heads, dim);
    float* const parts = held.data();
    float *const tops = parts + num_parts * heads * dim, *const sums = tops + num_parts * heads;
    Attention attention{current_kernels().attention, dtype, query_dtype == kBFloat16, queries, factor, cache(keys, key_scales, strides, strides + 6),
                        cache(values, value_scales, strides + 3, strides + 9), ranges, bias, strides[12], strides[13], strides[14],
                        out, num_shared, heads, dim, num_chunks, words, shorts, tops, sums, parts};
    parallel_for(num_parts, num_threads, [](void* self, int64_t i) { static_cast<Attention*>(self)->chunk(i); }, &attention);
    parallel_for(batch * num_shared, num_threads, [](void* self, int64_t i) { static_cast<Attention*>(self)->combine(i); }, &attention);
}
