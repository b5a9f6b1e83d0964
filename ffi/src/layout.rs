//! Rust's idea of every shared struct, compared with the committed table; C's is compared with it by the test suite.

use std::fmt::Write as _;
use std::mem::offset_of;

use crate::bitmaps::{qcr_bitmap, qcr_range};
use crate::callbacks::qcr_block_callbacks;
use crate::create::qcr_create_options;
use crate::data::qcr_extent;
use crate::error::qcr_error;
use crate::inspect::{qcr_check_report, qcr_info, qcr_stats};
use crate::offline::qcr_commit_report;
use crate::options::{qcr_log, qcr_options};
use crate::queue::{qcr_completion, qcr_queue_info, qcr_queue_options};
use crate::recycle::{qcr_compact_report, qcr_progress};
use crate::snapshots::qcr_snapshot;

fn size_of_member<S, M>(_: impl Fn(&S) -> &M) -> usize {
    size_of::<M>()
}

macro_rules! layout {
    ($($name:ident { $($member:ident)* })*) => {{
        let mut table = String::new();
        $(
            let mut end = 0;
            $(
                let (offset, size) = (offset_of!($name, $member), size_of_member(|s: &$name| &s.$member));
                assert_eq!(offset, end, "padding before {}.{}", stringify!($name), stringify!($member));
                end = offset + size;
                writeln!(table, "{} {} {offset} {size}", stringify!($name), stringify!($member)).unwrap();
            )*
            assert_eq!(end, size_of::<$name>(), "padding at the end of {}", stringify!($name));
            writeln!(table, "{} - 0 {}", stringify!($name), size_of::<$name>()).unwrap();
        )*
        table
    }};
}

/// Shared structs are copied as bytes, so there must be none that nobody set; and no member may ever move.
#[test]
fn structs_are_laid_out_as_committed() {
    let ours = layout! {
        qcr_error { struct_size code offset field message }
        qcr_options {
            struct_size flags keep_erased compact_after_unmaps settle_ms flush_ms rate_limit l2_cache_size backing
            backing_format backing_directory id data_file reserved passphrase passphrase_length
        }
        qcr_log { struct_size level user destroy log }
        qcr_block_callbacks {
            struct_size flags user destroy preadv pwritev flush length truncate punch_hole write_zeroes copy_range
            submit_preadv submit_pwritev submit_flush
        }
        qcr_create_options {
            struct_size flags virtual_size cluster_size refcount_bits version backing_file backing_format data_file
        }
        qcr_extent { struct_size kind length host_offset }
        qcr_queue_options { struct_size flags depth threads }
        qcr_queue_info { struct_size flags pending }
        qcr_completion { user_data result reserved }
        qcr_progress { struct_size reserved done total file_size }
        qcr_compact_report { struct_size reserved file_size_before file_size_after moved cancelled }
        qcr_bitmap { struct_size flags granularity dirty name }
        qcr_range { struct_size reserved offset length }
        qcr_snapshot { struct_size nanoseconds seconds vm_clock vm_state_size virtual_size id name }
        qcr_commit_report { struct_size reserved written zeroed }
        qcr_stats {
            struct_size reserved virtual_size file_size used freed junk erased available roots copies moves_copying
            moves_copied moves_flushed moves_referenced recycler_running guest_reads guest_read_bytes guest_writes
            guest_write_bytes guest_discards guest_discard_bytes guest_flushes device_flushes metadata_read_bytes
            metadata_write_bytes moved_bytes moves_cancelled erased_bytes truncated_bytes compactions background_errors
        }
        qcr_info {
            struct_size version virtual_size cluster_size file_size refcount_bits flags snapshots pinned backing_file
            backing_format data_file
        }
        qcr_check_report {
            struct_size messages corruptions leaks corruptions_fixed leaks_fixed allocated_clusters total_clusters
            fragmented_clusters image_end_offset
        }
    };
    let committed = include_str!("../../tests/c/layout.txt");
    assert_eq!(ours, committed, "only the end of a struct may grow, after its MIN_SIZE was frozen");
}
