//! Gauges and counters, and their Prometheus text.

use std::fmt::Write as _;

macro_rules! stats {
    ($($kind:ident $name:ident $doc:literal;)*) => {
        /// What an image and its recycler are doing. All sizes are in bytes. Gauges describe this moment, counters have
        /// only grown since the image was opened.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Stats {
            $(#[doc = $doc] pub $name: u64,)*
        }

        impl Stats {
            /// Every value with its name, kind (`gauge` or `counter`) and meaning, in the struct's order.
            pub fn fields(&self) -> impl Iterator<Item = (&'static str, &'static str, &'static str, u64)> {
                [$((stringify!($name), stringify!($kind), $doc, self.$name)),*].into_iter()
            }
        }
    };
}

stats! {
    gauge virtual_size "Size of the virtual disk.";
    gauge file_size "Length of the image file.";
    gauge used "Clusters that something refers to, metadata included.";
    gauge freed "Clusters whose unlinking is not durable yet, or that an older request may still use.";
    gauge junk "Free clusters with arbitrary contents.";
    gauge erased "Free clusters overwritten with zeroes, not flushed yet.";
    gauge available "Free clusters that are zero after any crash: the pool for new guest writes.";
    gauge roots "Clusters allocated and not linked yet, or being erased.";
    gauge copies "Destinations of moves in progress.";
    gauge moves_copying "Clusters being copied.";
    gauge moves_copied "Clusters copied, not flushed.";
    gauge moves_flushed "Clusters whose copy is durable.";
    gauge moves_referenced "Clusters whose new reference is not durable yet.";
    gauge recycler_running "1 while the recycler runs, 0 while it is stopped or paused.";
    counter guest_reads "Guest read requests.";
    counter guest_read_bytes "Bytes the guest read.";
    counter guest_writes "Guest write requests.";
    counter guest_write_bytes "Bytes the guest wrote.";
    counter guest_discards "Guest discard and write-zeroes requests.";
    counter guest_discard_bytes "Bytes the guest discarded or zeroed.";
    counter guest_flushes "Guest flush requests.";
    counter device_flushes "Flushes of the device.";
    counter metadata_read_bytes "Bytes of metadata read from the device.";
    counter metadata_write_bytes "Bytes of metadata written to the device.";
    counter moved_bytes "Bytes of clusters whose move was completed.";
    counter moves_cancelled "Moves cancelled by guest writes and discards.";
    counter erased_bytes "Bytes erased.";
    counter truncated_bytes "Bytes cut off the end of the file.";
    counter compactions "Compactions completed.";
    counter background_errors "Failures in the recycler's work.";
}

impl Stats {
    /// The values in Prometheus text exposition format, named `qcowrecycle_*`, labelled with the image's id.
    #[must_use]
    pub fn prometheus(&self, id: &str) -> String {
        let id = id.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let mut text = String::new();
        for (name, kind, help, value) in self.fields() {
            let suffix = if kind == "counter" { "_total" } else { "" };
            let _ = writeln!(text, "# HELP qcowrecycle_{name}{suffix} {help}");
            let _ = writeln!(text, "# TYPE qcowrecycle_{name}{suffix} {kind}");
            let _ = writeln!(text, "qcowrecycle_{name}{suffix}{{id=\"{id}\"}} {value}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prometheus_text_is_escaped_and_typed() {
        let stats = Stats { junk: 65536, guest_reads: 3, ..Stats::default() };
        let text = stats.prometheus("a\"b\\c\nd");
        assert!(text.contains("# TYPE qcowrecycle_junk gauge\nqcowrecycle_junk{id=\"a\\\"b\\\\c\\nd\"} 65536\n"));
        assert!(text.contains("qcowrecycle_guest_reads_total{id="));
        assert_eq!(text.lines().count(), 3 * stats.fields().count());
    }
}
