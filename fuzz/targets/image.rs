//! Whole images, damaged by libFuzzer in turn with mutations that know the format.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow_recycler_fuzz::image(data));

libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed.is_multiple_of(3) {
        libfuzzer_sys::fuzzer_mutate(data, size, max_size)
    } else {
        qcow_recycler_fuzz::mutate_image(data, size, max_size, seed)
    }
});
