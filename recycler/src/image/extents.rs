//! How ranges of the virtual disk are stored.

use super::Image;
use super::mapping::{Purpose, RunKind};
use crate::device::BlockDevice;
use crate::error::Result;
use crate::units::GuestOffset;

/// How a range of the virtual disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, from the offset that was asked for.
    pub length: u64,
    /// What it is.
    pub kind: ExtentKind,
}

/// How bytes of the virtual disk are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// In the image file, or in its external data file, in one piece, from this byte on; encrypted if the image's data is.
    Data {
        /// Offset in that file.
        host_offset: u64,
    },
    /// In the image file, compressed.
    Compressed,
    /// They read as zeroes, whatever the backing file has; nothing is read from the file.
    Zero,
    /// Not allocated: they read as the backing file does, or as zeroes without one.
    Unallocated,
}

impl<D: BlockDevice> Image<D> {
    /// How the bytes from `offset` on are stored, for at most `length` bytes: the longest range of one kind, both multiples
    /// of 512. While guests write, the answer may be out of date at once.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn extent(&self, offset: u64, length: u64) -> Result<Extent> {
        let _request = self.epochs.enter();
        self.check_request(offset, length)?;
        let mut extent: Option<Extent> = None;
        let mut done = 0;
        while done < length {
            let run = self.lookup(GuestOffset(offset + done), length - done, Purpose::Read).await?;
            let kind = match run.kind {
                RunKind::Data { host, .. } => ExtentKind::Data { host_offset: host.0 },
                RunKind::Compressed { .. } => ExtentKind::Compressed,
                RunKind::Zero => ExtentKind::Zero,
                RunKind::Unallocated => ExtentKind::Unallocated,
            };
            match &mut extent {
                None => extent = Some(Extent { length: run.length, kind }),
                Some(e) => {
                    let continues = match (e.kind, kind) {
                        (ExtentKind::Data { host_offset: a }, ExtentKind::Data { host_offset: b }) => a + e.length == b,
                        (a, b) => a == b,
                    };
                    if !continues {
                        break;
                    }
                    e.length += run.length;
                }
            }
            done += run.length;
        }
        Ok(extent.unwrap_or(Extent { length: 0, kind: ExtentKind::Unallocated }))
    }
}
