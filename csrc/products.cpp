// y = x W^T + b for few rows of x, from weights in fp32, bf16, int8 or int4: what a model does for one token after the other.
// Called by deepspeed/kernels/native_products.py. The rows of W are dealt to the threads, each is read once, and meets all rows
// of x while it is in the first-level cache. Results depend neither on threads nor on the instruction set.

#include <algorithm>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "native.h"
#include "threads.h"

namespace {

constexpr int64_t kTaskBytes = 64 * 1024;
constexpr int64_t kCached = 512 * 1024;  // bytes of a weight that stays in a core's caches: to ask for it is in vain
constexpr int64_t kPlaces = 4;  // read side by side: more would push each other out of the caches
constexpr int64_t kApart = 66 * 1024;  // bytes that a place begins behind the one before it: see `row_of`
constexpr int64_t kMaxPart = 512;      // elements whose products with 8 bits add up to less than 2^31

// The largest divisor of a group that is a multiple of 32 and small enough.
int64_t part_of(int64_t group_size) {
    int64_t part = group_size < kMaxPart ? group_size : kMaxPart;
    while (group_size % part) part -= 32;
    return part;
}

// Memory that begins with a line, so that no register's load takes two (Zen 4: int4 from a cache 3 to 7 % faster).
template <class Element>
class Lines {
   public:
    Element* fit(int64_t numel) {
        lines_.resize((static_cast<size_t>(numel) * sizeof(Element) + sizeof(Line) - 1) / sizeof(Line));
        return data();
    }
    Element* data() { return reinterpret_cast<Element*>(lines_.data()); }
    const Element* data() const { return reinterpret_cast<const Element*>(lines_.data()); }

   private:
    struct alignas(64) Line {
        char bytes[64];
    };
    std::vector<Line> lines_;
};

// The rows of x beside integers: with 15 bits and a scale per part; `offsets` takes back the 8 that is added to weights of int4.
struct Vectors {
    std::vector<int16_t> rounded;
    Lines<int16_t> values;
    int64_t stride, padded;  // of a row's `values`, and its parts: whole eights of groups, the parts past the end 0
    std::vector<float> scales;
    std::vector<int32_t> offsets;

    void fill(const float* x, int64_t batch, int64_t width, int64_t part, const Kernels& kernels, bool is_int4) {
        const int64_t parts = width / part;
        rounded.resize(width);
        stride = (width + 511) / 512 * 512;
        padded = (parts + 7) / 8 * 8;
        values.fit(batch * stride);
        scales.assign(batch * padded, 0.0f);
        offsets.assign(batch * padded, 0);
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t p = 0; p < parts; ++p) {
                int16_t* const to = rounded.data() + p * part;
                scales[b * padded + p] = kernels.attention.to_words(x + b * width + p * part, static_cast<size_t>(part), to);
                int32_t sum = 0;
                for (int64_t i = 0; is_int4 && i < part; ++i) sum += to[i];
                offsets[b * padded + p] = -8 * sum;
            }
            kernels.products.arrange[is_int4](rounded.data(), static_cast<size_t>(width), static_cast<size_t>(part), values.data() + b * stride);
        }
    }
};

// The rows of x beside bfloat16: the even elements of each kParted first, as far as there are whole ones.
void part_even_and_odd(const float* x, int64_t width, int64_t batch, std::vector<float>* to) {
    to->resize(batch * width);
    const int64_t whole = width / kParted * kParted, half = kParted / 2;
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0; i < width; ++i)
            (*to)[b * width + (i < whole ? i / kParted * kParted + i % 2 * half + i % kParted / 2 : i)] = x[b * width + i];
}

struct Product {
    const ProductLoops& loops;
    const uint8_t* weight;
    int bits;  // 32, 16, 8 or 4
    const float* scales;
    int64_t group_size, part;
    const float *x, *bias;
    float* y;
    int64_t num_rows, width, batch;
    int64_t apart, behind, rows_per_task;  // rows are read in kPlaces places side by side, `apart` rows from each other
    const Vectors* vectors;
    int64_t row_nbytes, groups, parts;  // of a row: to divide for each row anew costs a tenth of the time

    // The k-th of the kStreams rows that are worked on together; past the end where a stream has run out. A place begins `behind` rows
    // further on than the one before it, and comes round: where places lie a power of two from each other, what is read of them at a time
    // would lie in one bank of memory (Zen 5, 192 MiB: int8 at 76 % of the bandwidth so, 93 % as it is).
    int64_t row_of(int64_t index, int k) const {
        const int64_t place = k % kPlaces, at = index * (kStreams / kPlaces) + k / kPlaces + place * behind;
        return place * apart + (at < apart ? at : at - apart);
    }

    // `held` has kStreams * parts floats where parts are smaller than groups.
    void rows(int64_t index, float* held) const {
        IntegerRows rows;
        const void* at[kStreams];
        for (int k = 0; k < kStreams; ++k) {
            const int64_t row = row_of(index, k) < num_rows ? row_of(index, k) : num_rows - 1;
            at[k] = rows.values[k] = weight + row * row_nbytes;
            rows.scales[k] = scales + row * groups;
            if (part == group_size) continue;
            float* const repeated = held + k * parts;
            for (int64_t p = 0; p < parts; ++p) repeated[p] = rows.scales[k][p * part / group_size];
            rows.scales[k] = repeated;
        }
        if (batch > 1) return several(at, rows, index);
        float out[kStreams];
        if (bits >= 16)
            dot_floats(at, 0, 1, out);
        else
            loops.integers[bits == 4](rows, beside(0), out);
        put(index, 0, out);
    }

    void put(int64_t index, int64_t b, const float* out) const {
        for (int k = 0; k < kStreams; ++k) {
            const int64_t row = row_of(index, k);
            if (row < num_rows) y[b * num_rows + row] = out[k] + (bias ? bias[row] : 0.0f);
        }
    }

    void dot_floats(const void* const* at, int64_t b, int64_t count, float* out) const {
        const auto loop = bits == 32 ? loops.fp32[num_rows * row_nbytes <= kCached] : loops.bf16;
        loop(at, x + b * width, static_cast<size_t>(width), static_cast<size_t>(count), out);
    }

    Integers beside(int64_t b) const {
        return {vectors->values.data() + b * vectors->stride, vectors->scales.data() + b * vectors->padded,
                vectors->offsets.data() + b * vectors->padded, static_cast<size_t>(parts), static_cast<size_t>(part)};
    }

    // All rows of x. Apart, out of the way of one row (Zen 4: bf16 at 89 % of the bandwidth, 85 with this loop in it).
    __attribute__((noinline)) void several(const void* const* at, const IntegerRows& rows, int64_t index) const {
        for (int64_t first = 0; first < batch; first += kBatch) {
            float out[kBatch * kStreams];
            const int64_t count = batch - first < kBatch ? batch - first : kBatch;
            if (bits >= 16) {
                dot_floats(at, first, count, out);
            } else {
                Integers found[kBatch];
                for (int64_t b = 0; b < count; ++b) found[b] = beside(first + b);
                loops.several[bits == 4](rows, found, static_cast<size_t>(count), out);
            }
            for (int64_t b = 0; b < count; ++b) put(index, first + b, out + b * kStreams);
        }
    }
};

}  // namespace

// weight [num_rows, width], row by row, of 32 (fp32), 16 (bf16), 8 or 4 bits; the last two with scales [num_rows, width /
// group_size], group_size a multiple of 32 and at most 4096, int4 two a byte, the even one in the low bits, 8 added. x [batch, width],
// bias [num_rows] or null, y [batch, num_rows].
DS_API void ds_product(const uint8_t* weight, int bits, const float* scales, int64_t group_size, const float* x,
                       const float* bias, float* y, int64_t num_rows, int64_t width, int64_t batch, int num_threads) {
    static thread_local Vectors vectors;
    static thread_local std::vector<float> parted;
    const Kernels& kernels = current_kernels();
    const int64_t part = bits < 16 ? part_of(group_size) : group_size;
    if (bits < 16) vectors.fill(x, batch, width, part, kernels, bits == 4);
    if (bits == 16) part_even_and_odd(x, width, batch, &parted);
    const int64_t num_together = (num_rows + kStreams - 1) / kStreams;
    Product product{kernels.products, weight, bits, scales, group_size, part, bits == 16 ? parted.data() : x, bias, y, num_rows, width, batch,
                    num_together * (kStreams / kPlaces), 0, 1, &vectors, width * bits / 8, width / group_size, width / part};
    product.behind = std::min((kApart + product.row_nbytes - 1) / product.row_nbytes, product.apart / kPlaces);
    const int64_t fitting = kTaskBytes / (kStreams * product.row_nbytes);
    product.rows_per_task = fitting > 0 ? fitting : 1;
    const int64_t num_tasks = (num_together + product.rows_per_task - 1) / product.rows_per_task;
    parallel_for(num_tasks, num_threads, [](void* self, int64_t index) {
        const Product& all = *static_cast<Product*>(self);
        const int64_t stop = (index + 1) * all.rows_per_task;
        const int64_t end = all.apart * kPlaces / kStreams;
        // Not thread_local: to ask for its address for each eight rows costs a tenth of the time (Zen 4, glibc 2.36: fp32 at 78 % of
        // the bandwidth so, 90 % without).
        std::vector<float> held(all.part == all.group_size ? 0 : kStreams * all.parts);
        for (int64_t i = index * all.rows_per_task; i < stop && i < end; ++i) all.rows(i, held.data());
    }, &product);
}

// The sum of numel 64-bit words, read in `streams` places at once (of which each has the same number, the rest left out).
DS_API uint64_t ds_read(const uint64_t* words, int64_t numel, int streams) {
    return current_kernels().products.read(words, static_cast<size_t>(numel), static_cast<size_t>(streams));
}
