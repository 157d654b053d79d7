// What every source of libdeepspeed_native.so shares: how a function is exported, and the library's version.
//
// Functions marked DS_API are what deepspeed/kernels/native.py and its users call through ctypes: plain C types, no exceptions.
#pragma once

#define DS_API extern "C" __attribute__((visibility("default")))

// Raise by one with every change of an exported function, here and in deepspeed/kernels/native.py: an older build then says so
// instead of being called with other arguments.
#define DS_NATIVE_ABI 15
