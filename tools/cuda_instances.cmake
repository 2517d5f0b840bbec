# The large kernels of block attention have a file per stage and element type. The files are alike but for two names, so
# the build writes them, below its own folder, and lists them in CUDA_INSTANCES, and those of a stage in
# MOBA_<stage>_INSTANCES. They include by paths from csrc.
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
    string(TOUPPER "${Stage}" STAGE)
    list(APPEND MOBA_${STAGE}_INSTANCES "${INSTANCE}")
  endforeach()
endforeach()

# Appends to CUDA_SOURCES a file that the build writes and that includes the others, by paths from csrc.
function(compile_together name)
  set(TEXT "")
  foreach(source IN LISTS ARGN)
    string(APPEND TEXT "#include \"${source}\"\n")
  endforeach()
  set(TOGETHER "${CMAKE_CURRENT_BINARY_DIR}/together/${name}_cuda.cu")
  file(CONFIGURE OUTPUT "${TOGETHER}" @ONLY CONTENT "${TEXT}")
  set(CUDA_SOURCES ${CUDA_SOURCES} "${TOGETHER}" PARENT_SCOPE)
endfunction()
