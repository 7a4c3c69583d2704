// The choice of the kernels for a call: mma.sync or wgmma.
#pragma once

#include "../fastgemm.h"
#include "device.h"

namespace fg {

// Resolves arch (0, 80 or 90, without flags) to the path to run: 80 or 90; otherwise an error code is stored and 0 returned.
inline int choose_path(int arch, int* error) {
  const int device = device_arch();
  if (device < 0) {
    *error = FG_ERROR_CUDA - device;
    return 0;
  }
  const bool wgmma = device == 90;
  const int path = arch == 0 ? (wgmma ? 90 : 80) : arch;
  const bool available = (path == 90 && wgmma) || (path == 80 && device >= 80);
  if (!available) {
    *error = FG_ERROR_ARCH;
    return 0;
  }
  return path;
}

}  // namespace fg
