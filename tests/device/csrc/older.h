// What torch's headers lack before DeviceAllocator came: the same name with the members that the simulated device overrides.
// Nothing of such a torch calls them; `tests/device/sim.py` asks the runtime. build.py looks which headers these are.
#pragma once

#ifdef SIM_WITHOUT_DEVICE_ALLOCATOR
#include <c10/core/CachingDeviceAllocator.h>

namespace c10 {

using MempoolId_t = std::pair<uint64_t, uint64_t>;

struct DeviceAllocator : Allocator {
  virtual bool initialized() = 0;
  virtual void emptyCache(MempoolId_t pool) = 0;
  virtual void recordStream(const DataPtr& data, Stream stream) = 0;
  virtual CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) = 0;
  virtual void resetAccumulatedStats(DeviceIndex device) = 0;
  virtual void resetPeakStats(DeviceIndex device) = 0;
  virtual std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) = 0;
};

}  // namespace c10
#endif
