# The large kernels of block attention are compiled in a file per stage and element type, side by side. The files are
# alike but for two names, so the build writes them, below its own folder, and lists them in CUDA_INSTANCES. They
# include by paths from csrc.
set(CUDA_INSTANCES "")
foreach(Stage Forward Backward Route)
  foreach(Element BFloat16 Float16 float)
    string(TOLOWER "${Stage}" stage)
    string(TOLOWER "${Element}" dtype)
    string(REGEX REPLACE "^float$" "float32" dtype "${dtype}")
    set(Kernels "const ${Stage}Kernels&")
    if(Stage STREQUAL "Backward")
      set(Kernels "BackwardKernels")
    endif()
    set(INSTANCE "${CMAKE_CURRENT_BINARY_DIR}/instances/moba_${stage}_${dtype}_cuda.cu")
    file(CONFIGURE OUTPUT "${INSTANCE}" @ONLY CONTENT
"#include \"moba/moba_@stage@_cuda.cuh\"

namespace topgather {
@Kernels@ @stage@_kernels(@Element@) { return k@Stage@Kernels<@Element@>; }
}  // namespace topgather
")
    list(APPEND CUDA_INSTANCES "${INSTANCE}")
  endforeach()
endforeach()
