//! L2 entries, compressed clusters and refcounts.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow_recycler_fuzz::entries(data));
