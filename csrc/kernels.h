// The loops of the optimizers, once per instruction set, behind one table of functions.
//
// Every loop works on fp32 arrays in the first-level cache or in memory and does only IEEE additions, multiplications,
// divisions and square roots, each rounded once (-ffp-contract=off). So an element's result depends on nothing but its
// inputs: not on the instruction set, the thread, its neighbours, or where in an array it lies.
#pragma once

#include <cstddef>
#include <cstdint>

enum Precision : int { kNone = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

enum Decay : int { kNoDecay = 0, kDecoupled = 1, kL2 = 2 };

enum Momentum : int { kPlain = 0, kHeavyBall = 1, kNesterov = 2 };

constexpr int kNumScalars = 10;  // per run; the meaning of each is beside the loop that reads it
constexpr int kBlock = 1024;     // the most elements a loop is called for
constexpr int kChunk = 512;      // positions of a cache that one call of attention's loops takes
constexpr int kStreams = 8;      // rows of a weight that are read side by side
constexpr int64_t kBatch = 8;    // rows of x that one call of products takes
constexpr int kParted = 32;      // elements of bfloat16, a line, of which the even ones are multiplied first
constexpr int kNumLanes = 16;    // sums are made in this many lanes on every instruction set

// One step on n elements. `sums` [2 * kNumLanes] is for LAMB alone.
using Loop = void (*)(float* param, const float* grad, float* first, float* second, size_t n, const float* scalars,
                      double* sums);

// Group-wise quantisation and signs; see quantize.inl, where the loops are, and quantize.cpp, which calls them.
struct QuantizeLoops {
    uint32_t (*magnitude)(const float* x, size_t n);  // the largest |x|, as the bits of a float; above infinity's for NaN
    void (*range)(const float* x, size_t n, float* lowest, float* highest);
    void (*to_bytes)(const float* x, uint8_t* q, size_t n, float low, float scale, int offset);
    void (*to_nibbles)(const float* x, uint8_t* q, size_t n, float low, float scale, int offset);
    void (*from_bytes[2])(const uint8_t* q, float* x, size_t n, float low, float scale);  // unsigned, signed
    void (*from_nibbles)(const uint8_t* q, float* x, size_t n, float low, float scale, int offset);
    void (*square_sums)(const float* x, const float* error, size_t n, double* sums);
    void (*take_signs)(const float* x, float* error, uint8_t* bits, size_t n, float scale);
    void (*add_signs)(const uint8_t* bits, float* into, size_t n, float scale);
};

// Rows of a weight of 8 or 4 bits, and of a vector beside it: as `arrange` left it, scaled group by group; of int4 with what makes up
// for the 8 that is added to weights: -8 times the sum of each group. `group_size` is a multiple of 32; `scales` and `offsets` have whole
// eights, zeros at the end.
struct IntegerRows {
    const uint8_t* values[kStreams];
    const float* scales[kStreams];
};

struct Integers {
    const int16_t* values;
    const float* scales;
    const int32_t* offsets;
    size_t num_groups, group_size;
};

// Dot products of kStreams rows of a weight with the rows of x, out [batch, kStreams]; see products.inl. By 8 and 4 bits where there are
// two.
struct ProductLoops {
    void (*fp32[2])(const void* const* rows, const float* x, size_t n, size_t batch, float* out);  // of weights in memory, in a cache
    void (*bf16)(const void* const* rows, const float* x, size_t n, size_t batch, float* out);  // x: the even elements of each whole 16 first
    void (*integers[2])(const IntegerRows& rows, const Integers& x, float* out);  // of one row
    void (*several[2])(const IntegerRows& rows, const Integers* x, size_t batch, float* out);
    void (*arrange[2])(const int16_t* q, size_t n, size_t group_size, int16_t* to);
    uint64_t (*read)(const uint64_t* words, size_t n, size_t streams);
};

// Attention over a chunk of a cache, for the heads that share it; see attention.inl. By element: fp32, bfloat16. `cache`: the one of the
// processor, first or second, that rows to come are asked for.
struct AttentionLoops {
    void (*score[2])(const void* keys, int64_t stride, size_t n, size_t dim, const float* queries, size_t heads, float factor,
                     float* scores, int cache);
    void (*score_short)(const uint16_t* keys, int64_t stride, size_t n, size_t dim, const uint16_t* queries, size_t heads, float factor,
                        float* scores, int cache);  // of queries that are bfloat16 too; null where there is no instruction for it
    void (*score_bytes)(const int8_t* keys, int64_t stride, size_t n, size_t dim, const int16_t* queries, size_t heads,
                        int32_t* sums, int cache);
    float (*largest)(const float* x, size_t n);
    float (*weigh[3])(float* x, size_t n, float top);  // as they are, in 16 bits and in 8 for bfloat16
    float (*weigh_words)(float* x, const float* by, size_t n, float top, int16_t* to, float* sum);
    void (*scale_sums)(const int32_t* sums, const float* by, float factor, size_t n, float* to);
    void (*to_floats)(const int32_t* sums, float factor, size_t n, float* to);
    void (*add_scaled)(const float* x, float factor, size_t n, float* to);
    float (*to_words)(const float* x, size_t n, int16_t* to);
    void (*mix[2])(const void* values, int64_t stride, size_t n, size_t dim, const float* weights, size_t heads, float* out, int cache);
    void (*mix_short)(const void* values, int64_t stride, size_t n, size_t dim, const float* weights, size_t heads,
                      float* out, int cache);  // of weights in 8 bits; null where there is no instruction for it
    void (*mix_bytes)(const int8_t* values, int64_t stride, size_t n, size_t dim, const int16_t* weights, size_t heads,
                      int32_t* out, int cache);
    void (*gather)(const float* x, size_t dim, float* to);
    void (*spread)(float* x, size_t dim);
    void (*spread_short)(float* x, size_t dim);  // of what mix_short leaves
    void (*shorten)(float* x, size_t n);
    int cache;
};

// Experts with gated MLPs, up [2 * inner, width] and down [width, inner]; see experts.inl. `before` [padded tokens, 2 * inner] and
// `scratch` have as many floats as `room` and `scratch` say; of_up, of_down and of_tokens may be null.
struct ExpertCall {
    const float *tokens, *gradient;
    float *out, *of_tokens;
    size_t width, inner;
};

struct ExpertLoops {
    size_t (*room)(size_t count);
    size_t (*scratch)(size_t width, size_t inner);
    void (*forward)(const ExpertCall& call, const float* up, const float* down, const int64_t* at, const float* factors, size_t count,
                    float* before, float* scratch);
    void (*backward)(const ExpertCall& call, const float* up, const float* down, const int64_t* at, const float* factors, size_t count,
                     const float* before, float* of_factors, float* of_up, float* of_down, float* scratch);
};

struct Kernels {
    void (*widen[2])(const uint16_t* from, float* to, size_t n);       // by Precision - kBFloat16
    void (*narrow[2])(const float* from, uint16_t* to, size_t n);      // nearest even; NaN stays NaN
    void (*add)(const float* a, const float* b, float* to, size_t n);  // `to` may be a or b
    void (*divide[2])(const float* x, float by, float* to, size_t n);  // written, added
    Loop adam[3];                                                  // by Decay
    Loop lion[2];                                                  // by Decay: there is no L2 form
    Loop adagrad[2];                                               // without and with L2 decay
    Loop sgd[3];                                                   // by Momentum
    Loop lamb_moments[2], lamb_apply[2];                           // eps outside and inside of the root
    QuantizeLoops quantize;
    ProductLoops products;
    AttentionLoops attention;
    ExpertLoops experts;

    // Elements [offset, offset + n) of an array as fp32: in place, or widened into `scratch`.
    float* read(const void* array, int dtype, int64_t offset, size_t n, float* scratch) const {
        if (dtype == kFloat32) return static_cast<float*>(const_cast<void*>(array)) + offset;
        widen[dtype - kBFloat16](static_cast<const uint16_t*>(array) + offset, scratch, n);
        return scratch;
    }

    // Back to where `read` found them, unless they are there.
    void write(void* array, int dtype, int64_t offset, size_t n, const float* values) const {
        if (dtype != kFloat32) narrow[dtype - kBFloat16](values, static_cast<uint16_t*>(array) + offset, n);
    }
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
Kernels avx2_kernels(bool has_large_first_cache);  // of 48 KB
// Of a processor that takes registers of 512 bits whole (and has such a cache: Zen 5, Intel since Ice Lake), or in two halves (Zen 4).
Kernels avx512_kernels(bool takes_512_bits_whole), vnni_kernels(bool takes_512_bits_whole), bf16_kernels(bool takes_512_bits_whole);
#endif
