//! Reading the virtual disk.

use std::io::Read as _;

use super::Image;
use super::mapping::{Purpose, RunKind};
use crate::blocking::block_on;
use crate::buf::IoBufMut;
use crate::clusters::epochs::InFlight;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::l2;
use crate::units::GuestOffset;

impl<D: BlockDevice> Image<D> {
    /// Fills `buf` from byte `offset` of the virtual disk; both are multiples of 512 bytes.
    ///
    /// Any number of threads may read and write at once. A read that overlaps a write under way sees, for each 512-byte
    /// sector, old or new data.
    ///
    /// # Errors
    /// [`Error::Misaligned`], [`Error::OutOfRange`], [`Error::Closed`]; [`Error::Io`]; [`Error::Invalid`] for a table
    /// entry that cannot be; [`Error::PassphraseNeeded`]; [`Error::BackingNotAllowed`] where the contents are in a backing
    /// file that was skipped.
    pub async fn read(&self, offset: u64, mut buf: IoBufMut<'_>) -> Result<()> {
        let length = buf.len();
        let request = self.begin_waiting(offset, length as u64, Purpose::Read).await?;
        let done = self.read_at_once(&request, offset, &mut buf)?;
        if done < length {
            self.read_range(offset + done as u64, buf.slice(done..length)).await?;
        }
        self.end(request, length as u64, Purpose::Read);
        Ok(())
    }

    /// As [`read`](Self::read), on a thread of the caller's that may sleep. A request that has nothing to heed and need not wait
    /// for anybody makes no future.
    ///
    /// # Errors
    /// As there.
    #[inline(always)]
    pub(crate) fn read_blocking(&self, offset: u64, mut buf: IoBufMut<'_>) -> Result<()> {
        let length = buf.len();
        let Some(request) = self.begin_free(offset, length as u64, Purpose::Read) else {
            return self.read_waiting(offset, buf);
        };
        if self.read_mapped(offset, &mut buf)? {
            self.end_here(request, length as u64, Purpose::Read);
            return Ok(());
        }
        self.read_other(request, offset, buf)
    }

    #[cold]
    fn read_waiting(&self, offset: u64, buf: IoBufMut<'_>) -> Result<()> {
        block_on(self.read(offset, buf))
    }

    /// A request of another kind than [`read_mapped`](Self::read_mapped) knows. A function of its own, so that the other is
    /// short.
    #[inline(never)]
    fn read_other(&self, request: InFlight<'_>, offset: u64, mut buf: IoBufMut<'_>) -> Result<()> {
        let length = buf.len();
        let done = self.read_at_once(&request, offset, &mut buf)?;
        if done < length {
            block_on(self.read_range(offset + done as u64, buf.slice(done..length)))?;
        }
        self.end_here(request, length as u64, Purpose::Read);
        Ok(())
    }

    /// Reads; the caller is in flight. What lies past the end of the disk reads as its cluster does.
    pub(crate) async fn read_range(&self, offset: u64, mut buf: IoBufMut<'_>) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let run = self.lookup(GuestOffset(at), (buf.len() - done) as u64, Purpose::Read).await?;
            let end = done + run.length as usize;
            let mut part = buf.slice(done..end);
            match run.kind {
                RunKind::Data { host, .. } => self.read_data(host, GuestOffset(at), part).await?,
                RunKind::Zero => part.fill_zero(),
                RunKind::Unallocated => self.backing.read(at, part).await?,
                RunKind::Compressed { descriptor } => {
                    let cluster = self.decompress(descriptor).await?;
                    let within = (at & (self.meta.geometry.cluster_size() - 1)) as usize;
                    let bytes = cluster.get(within..within + part.len()).unwrap_or_default();
                    part.copy_from(bytes);
                }
            }
            done = end;
        }
        Ok(())
    }

    /// The contents of a compressed cluster.
    async fn decompress(&self, descriptor: u64) -> Result<Vec<u8>> {
        let (offset, length) = l2::compressed_extent(descriptor, self.meta.geometry);
        let invalid = |reason: String| Error::invalid("compressed cluster", offset, reason);
        let there = length.min(self.volume.length().saturating_sub(offset));
        if there == 0 {
            return Err(invalid("it lies outside the file".to_owned()));
        }
        let mut packed = vec![0; there as usize];
        self.volume.read("reading a compressed cluster", offset, IoBufMut::new(&mut packed)).await?;
        let mut cluster = vec![0; self.meta.geometry.cluster_size() as usize];
        // The extent ends with a sector, the compressed data before: what follows is ignored.
        let result = match self.compression_type {
            0 => flate2::read::DeflateDecoder::new(&packed[..]).read_exact(&mut cluster),
            _ => match ruzstd::decoding::StreamingDecoder::new(&packed[..]) {
                Ok(mut decoder) => decoder.read_exact(&mut cluster),
                Err(e) => Err(std::io::Error::other(e.to_string())),
            },
        };
        result.map_err(|e| invalid(format!("it does not decompress to a cluster: {e}")))?;
        Ok(cluster)
    }

    /// Whether a request is aligned and within the disk.
    #[inline]
    pub(super) fn is_on_disk(&self, offset: u64, length: u64) -> bool {
        let within = offset.checked_add(length).is_some_and(|end| end <= self.virtual_size());
        (offset | length) & 511 == 0 && within
    }

    /// The same, and whether the image is open.
    pub(crate) fn check_request(&self, offset: u64, length: u64) -> Result<()> {
        if self.is_closed() {
            return Err(Error::Closed);
        }
        if self.is_on_disk(offset, length) {
            return Ok(());
        }
        if (offset | length) & 511 != 0 {
            return Err(Error::Misaligned { offset, length });
        }
        Err(Error::OutOfRange { offset, length, size: self.virtual_size() })
    }
}
