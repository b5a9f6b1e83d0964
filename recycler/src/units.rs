//! Units are types: guest and host, offsets and clusters cannot be mixed up.

use std::fmt;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

unit!(
    /// A byte offset on the virtual disk.
    GuestOffset
);
unit!(
    /// A byte offset in the image file.
    HostOffset
);
unit!(
    /// The index of a cluster on the virtual disk.
    GuestCluster
);
unit!(
    /// The index of a cluster in the image file.
    HostCluster
);

/// The sizes that follow from an image's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// log2 of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits, 0 to 6.
    pub refcount_order: u32,
    /// Whether L2 entries are extended: of 16 bytes, with a bitmap of subclusters.
    pub extended_l2: bool,
}

impl Geometry {
    /// Cluster size in bytes.
    #[must_use]
    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// 8-byte words of one L2 entry.
    #[must_use]
    pub const fn l2_entry_words(&self) -> usize {
        if self.extended_l2 { 2 } else { 1 }
    }

    /// Entries in one L2 table.
    #[must_use]
    pub const fn l2_entries(&self) -> u64 {
        self.entries_per_cluster() / self.l2_entry_words() as u64
    }

    /// log2 of the size of a subcluster in bytes, where L2 entries are extended.
    #[must_use]
    pub const fn subcluster_bits(&self) -> u32 {
        self.cluster_bits - 5
    }

    /// Entries (of 8 bytes) in one cluster of the L1 or refcount table.
    #[must_use]
    pub const fn entries_per_cluster(&self) -> u64 {
        1 << (self.cluster_bits - 3)
    }

    /// Clusters that one refcount block counts.
    #[must_use]
    pub const fn refcounts_per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.refcount_order)
    }

    /// The highest refcount that the width can hold.
    #[must_use]
    pub const fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.refcount_order))
    }

    /// Where a host cluster starts in the file.
    #[must_use]
    pub const fn host_offset(&self, c: HostCluster) -> HostOffset {
        HostOffset(c.0 << self.cluster_bits)
    }

    /// The host cluster that holds a byte of the file.
    #[must_use]
    pub const fn host_cluster(&self, o: HostOffset) -> HostCluster {
        HostCluster(o.0 >> self.cluster_bits)
    }

    /// The guest cluster that holds a byte of the disk.
    #[must_use]
    pub const fn guest_cluster(&self, o: GuestOffset) -> GuestCluster {
        GuestCluster(o.0 >> self.cluster_bits)
    }

    /// Clusters needed for `bytes` bytes.
    #[must_use]
    pub const fn clusters_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }
}
