# libtokenizers_mm_cuda.so, for compute capability 8.0 and 9.0a with PTX for everything newer; the environment variable
# TOKENIZERS_MM_CUDA_ARCHITECTURES (as "90a" or "80 89") builds for these alone, without PTX and with line numbers for
# profilers. Include this file from the top CMakeLists.txt; it needs no CUDA support in CMake. Without nvcc it does
# nothing. A failing build is reported and leaves the CPU library alone, unless TOKENIZERS_MM_BUILD_CUDA=1 asks for it; 0 leaves CUDA out.

set(build_cuda "$ENV{TOKENIZERS_MM_BUILD_CUDA}")
if(build_cuda STREQUAL "0")
  message(STATUS "CUDA library: left out (TOKENIZERS_MM_BUILD_CUDA=0)")
  return()
endif()

find_program(TOKENIZERS_MM_NVCC nvcc HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" PATHS /usr/local/cuda/bin)
set(nvcc_version "")
if(TOKENIZERS_MM_NVCC)
  execute_process(COMMAND "${TOKENIZERS_MM_NVCC}" --version OUTPUT_VARIABLE nvcc_text ERROR_QUIET)
  if(nvcc_text MATCHES "release ([0-9]+\\.[0-9]+)")
    set(nvcc_version "${CMAKE_MATCH_1}")
  endif()
endif()
if(NOT nvcc_version OR nvcc_version VERSION_LESS 12.4)
  if(build_cuda STREQUAL "1")
    message(FATAL_ERROR "CUDA library: TOKENIZERS_MM_BUILD_CUDA=1 needs nvcc 12.4 or later, found '${nvcc_version}'")
  endif()
  message(STATUS "CUDA library: left out (no nvcc 12.4 or later)")
  return()
endif()
message(STATUS "CUDA library: nvcc ${nvcc_version} at ${TOKENIZERS_MM_NVCC}")

set(cuda_targets -gencode arch=compute_80,code=sm_80 -gencode arch=compute_80,code=compute_80
  -gencode arch=compute_90a,code=sm_90a)
if(NOT "$ENV{TOKENIZERS_MM_CUDA_ARCHITECTURES}" STREQUAL "")
  set(cuda_targets -lineinfo)
  separate_arguments(architectures UNIX_COMMAND "$ENV{TOKENIZERS_MM_CUDA_ARCHITECTURES}")
  foreach(architecture ${architectures})
    list(APPEND cuda_targets -gencode arch=compute_${architecture},code=sm_${architecture})
  endforeach()
endif()

set(cuda_source "${CMAKE_CURRENT_LIST_DIR}/cuda_nearest.cu")
set(cuda_library "${CMAKE_BINARY_DIR}/libtokenizers_mm_cuda.so")
file(GLOB cuda_headers CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/cuda_*.cuh" "${CMAKE_CURRENT_LIST_DIR}/cuda_*.h")
set(cuda_failure)
if(NOT build_cuda STREQUAL "1")
  set(cuda_failure || "${CMAKE_COMMAND}" -E echo "CUDA library: nvcc failed, the package is built without it")
endif()
add_custom_command(
  OUTPUT "${cuda_library}"
  COMMAND
    "${TOKENIZERS_MM_NVCC}" -std=c++17 -O3 -shared -cudart static ${cuda_targets}
    -Xcompiler=-fPIC,-fvisibility=hidden,-static-libstdc++,-static-libgcc -Xlinker=--exclude-libs,ALL,-s
    -o "${cuda_library}" "${cuda_source}" ${cuda_failure}
  DEPENDS "${cuda_source}" ${cuda_headers}
  COMMENT "Building the CUDA library")
add_custom_target(tokenizers_mm_cuda ALL DEPENDS "${cuda_library}")
install(FILES "${cuda_library}" DESTINATION tokenizers_mm/kernels OPTIONAL)
