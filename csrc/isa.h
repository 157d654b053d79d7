// Which instruction set the loops use: the best that this processor has, unless a caller chose another.
#pragma once

#include "kernels.h"

const Kernels& current_kernels();
