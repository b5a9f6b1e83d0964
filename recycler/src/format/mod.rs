//! Bytes to typed values and back, as QEMU's `docs/interop/qcow2.rst` defines them. No I/O here.

pub(crate) mod bitmap;
pub mod extension;
pub mod header;
pub mod l2;
pub mod luks;
pub mod refcount;
pub mod snapshot;
pub mod subclusters;
pub(crate) mod upgrade;
