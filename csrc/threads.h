// A few sleeping threads of our own, so that nothing depends on which OpenMP runtime torch was built with.
#pragma once

#include <cstdint>

// Calls task(context, i) once for every i in [0, num_tasks), on up to num_threads threads, the caller's among them.
// Neighbouring tasks stay on one thread as far as the load allows. The caller's rounding and flush-to-zero modes hold in
// all of them. While another thread is in here, the caller works alone: never a deadlock, never more threads than asked.
void parallel_for(int64_t num_tasks, int num_threads, void (*task)(void* context, int64_t index), void* context);
