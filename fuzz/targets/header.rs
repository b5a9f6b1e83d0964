//! Headers, their extensions, and snapshot table entries.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow_recycler_fuzz::header(data));
