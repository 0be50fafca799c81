// The kernels' headers ask for the runtime alone.
#pragma once

#include "cuda_runtime.h"
