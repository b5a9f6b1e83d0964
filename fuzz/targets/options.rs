//! Configuration strings.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow_recycler_fuzz::options(data));
