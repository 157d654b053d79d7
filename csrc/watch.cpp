// Whether many tensors are where and as they were, in one pass; called by deepspeed/kernels/native_watch.py.
//
// What a tensor says of itself comes from torch's own functions, whose addresses are handed in: nothing of torch is included here, so that
// one library does for all of its versions. What they throw counts as a change, which the caller looks at by torch.

#include <cstdint>

#include "native.h"

namespace {

using GetPointer = int32_t (*)(void*, void**);  // aoti_torch_get_data_ptr
using IsContiguous = int32_t (*)(void*, bool*);  // aoti_torch_is_contiguous
using GetVersion = int64_t (*)(const void*);     // at::TensorBase::_version
using GetGrad = const void* const* (*)(const void*);  // c10::TensorImpl::grad, which gives a reference to an at::Tensor

}  // namespace

// objects: Python's tensor objects, alive, with an at::Tensor at `offset` in each, which is one address: its implementation's. `impls`, and
// `pointers` or `versions` (null: not asked), are what those were; contiguity is asked with the pointers. no_grad: the implementation of
// gradients that are none (null: not asked). Holds the lock of Python's.
DS_API int64_t ds_are_as_before(const char* const* objects, int64_t num_objects, int64_t offset, const void* const* impls,
                                const void* const* pointers, GetPointer get_pointer, IsContiguous is_contiguous,
                                const int64_t* versions, GetVersion get_version, const void* no_grad, GetGrad get_grad) {
    try {
        for (int64_t i = 0; i < num_objects; ++i) {
            void* const tensor = const_cast<char*>(objects[i] + offset);
            if (*static_cast<const void* const*>(tensor) != impls[i]) return 0;
            if (pointers != nullptr) {
                void* pointer = nullptr;
                bool is_dense = false;
                if (get_pointer(tensor, &pointer) != 0 || pointer != pointers[i]) return 0;
                if (is_contiguous(tensor, &is_dense) != 0 || !is_dense) return 0;
            }
            if (no_grad != nullptr && *get_grad(impls[i]) != no_grad) return 0;
            if (versions != nullptr && get_version(tensor) != versions[i]) return 0;
        }
    } catch (...) {
        return 0;
    }
    return 1;
}
