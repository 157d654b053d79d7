// The instruction sets that this processor has, and the one in use; see isa.h.

#include "isa.h"

#include <atomic>
#include <vector>

#include "native.h"

namespace {

struct Isa {
    const char* name;
    const Kernels* kernels;
};

// From the best to the one that always works.
const std::vector<Isa>& usable() {
    static const std::vector<Isa> found = [] {
        std::vector<Isa> isas;
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // every processor with AVX2 has F16C
        const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        const bool is_wide = has_avx512 && !__builtin_cpu_is("amdfam19h");  // not Zen 4
        static const Kernels avx2 = avx2_kernels(is_wide);
        if (has_avx512) {
            static const Kernels avx512 = avx512_kernels(is_wide), vnni = vnni_kernels(is_wide), bf16 = bf16_kernels(is_wide);
            if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")) isas.push_back({"avx512_bf16", &bf16});
            if (__builtin_cpu_supports("avx512vnni")) isas.push_back({"avx512_vnni", &vnni});
            isas.push_back({"avx512", &avx512});
        }
        if (has_avx2) isas.push_back({"avx2", &avx2});
#endif
        isas.push_back({"portable", &kPortableKernels});
        return isas;
    }();
    return found;
}

std::atomic<int> chosen{0};

}  // namespace

const Kernels& current_kernels() { return *usable()[chosen].kernels; }

DS_API int ds_native_abi() { return DS_NATIVE_ABI; }

// The name of the i-th instruction set that this processor has, best first; null past the last.
DS_API const char* ds_isa_name(int i) {
    return i >= 0 && i < static_cast<int>(usable().size()) ? usable()[i].name : nullptr;
}

// Which of them the loops use from now on.
DS_API int ds_isa_chosen() { return chosen; }
DS_API void ds_isa_choose(int i) { chosen = i; }
