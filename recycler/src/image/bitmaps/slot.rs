//! The header extension that names the bitmap directory.
//!
//! It lies somewhere in the first cluster. While the autoclear bit of the bitmaps is clear, nobody believes it; so a change
//! that cannot be made by writing one sector is made between clearing the bit, durably, and setting it again.

use crate::buf::{IoBuf, IoBufMut};
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::bitmap::extension;
use crate::format::extension::{Slot, bitmaps_slot, kind};
use crate::format::header::{self, AUTOCLEAR_BITMAPS, Header};
use crate::image::Image;
use crate::metadata::commit::CommitTurn;
use crate::units::HostOffset;

const SECTOR: u64 = 512;
/// Bytes of the extension's data.
const DATA: u64 = 24;
/// Bytes that an extension takes with its type and length, and the end mark after it.
const WITH_END: u64 = 8 + DATA + 8;

impl<D: BlockDevice> Image<D> {
    /// Fails if the header's cluster has no room for the extension.
    ///
    /// # Errors
    /// [`Error::Unsupported`]; [`Error::Io`].
    pub(super) async fn ensure_slot(&self) -> Result<()> {
        self.find_slot().await.map(|_| ())
    }

    /// Finds the place of the extension. Nobody else writes to the first cluster until what is returned is dropped.
    ///
    /// # Errors
    /// As [`ensure_slot`](Self::ensure_slot).
    pub(super) async fn find_slot(&self) -> Result<Found<'_>> {
        let turn = self.meta.exclusive_turn().await;
        let mut cluster = vec![0; self.meta.geometry.cluster_size() as usize];
        self.volume.read("reading the header", 0, IoBufMut::new(&mut cluster)).await?;
        let header = Header::parse(&cluster, self.volume.length())?;
        let room = self.room(&cluster, &header)?;
        Ok(Found { turn, header, room })
    }

    /// Lets the header name a directory of `count` bitmaps, durably; `named`: it names one. The directory, and what it names,
    /// is durable. Whoever gives this up, or finds that it failed, does not know what the header says.
    pub(super) async fn name_directory(
        &self,
        found: Found<'_>,
        count: u32,
        (directory, size): (HostOffset, u64),
        named: bool,
    ) -> Result<()> {
        let data = extension(count, directory, size);
        let Found { turn, header, room } = found;
        match room {
            Room::Existing { at, .. } if named && at / SECTOR == (at + DATA - 1) / SECTOR => {
                // One sector: the old directory is named, or the new one.
                self.patch(&turn, at, &data).await
            }
            Room::Existing { at, .. } => {
                self.believe_bitmaps(&turn, false, &header).await?;
                self.patch(&turn, at, &data).await?;
                self.believe_bitmaps(&turn, true, &header).await
            }
            Room::New { end, name } => {
                // The bit is clear: there was no extension.
                if let Some((at, name)) = name {
                    // Cut before the header's sector is written: the name stands where it was. After: its copy does.
                    self.patch(&turn, at, &name).await?;
                    turn.rewrite_header(&self.volume, |sector| header::patch_backing_offset(sector, at)).await?;
                }
                // What follows the end mark is not read. The mark itself is replaced last, in one sector.
                self.patch(&turn, end + 8, &[&data[..], &[0; 8]].concat()).await?;
                self.patch(&turn, end, &[kind::BITMAPS.to_be_bytes(), (DATA as u32).to_be_bytes()].concat()).await?;
                self.believe_bitmaps(&turn, true, &header).await
            }
        }
    }

    /// Lets the header name no directory, durably. As [`name_directory`](Self::name_directory) otherwise.
    pub(super) async fn name_no_directory(&self, found: Found<'_>) -> Result<()> {
        let Found { turn, header, room } = found;
        self.believe_bitmaps(&turn, false, &header).await?;
        if let Room::Existing { at, last: true } = room {
            self.patch(&turn, at - 8, &[0; 8]).await?;
        }
        Ok(())
    }

    fn room(&self, cluster: &[u8], header: &Header) -> Result<Room> {
        let no_room = || Error::unsupported("bitmaps in an image whose header has no room for them");
        let (start, name) = (u64::from(header.header_length), header::backing_name(cluster));
        let area_end = name.map_or(cluster.len(), |(at, _)| at as usize);
        let area = cluster.get(start as usize..area_end).unwrap_or_default();
        let end = match bitmaps_slot(area, start)?.ok_or_else(no_room)? {
            Slot::Existing { at, last } => return Ok(Room::Existing { at, last }),
            Slot::Missing { end } => end,
        };
        let needed = end + WITH_END;
        let Some((at, length)) = name.filter(|&(at, _)| at < needed) else {
            return if needed <= cluster.len() as u64 { Ok(Room::New { end, name: None }) } else { Err(no_room()) };
        };
        // The name stands in the way: a copy goes past what both use now.
        let to = (at + length).max(needed).next_multiple_of(8);
        let bytes = cluster.get(at as usize..(at + length) as usize).unwrap_or_default().to_vec();
        if to + length > cluster.len() as u64 {
            return Err(no_room());
        }
        Ok(Room::New { end, name: Some((to, bytes)) })
    }

    async fn believe_bitmaps(&self, turn: &CommitTurn<'_>, believe: bool, header: &Header) -> Result<()> {
        let others = header.autoclear & !AUTOCLEAR_BITMAPS;
        let bits = if believe { others | AUTOCLEAR_BITMAPS } else { others };
        turn.rewrite_header(&self.volume, |sector| header::patch_autoclear(sector, bits)).await
    }

    /// Writes bytes of the first cluster, in whole sectors, and makes that durable.
    async fn patch(&self, turn: &CommitTurn<'_>, at: u64, bytes: &[u8]) -> Result<()> {
        let end = at + bytes.len() as u64;
        if at < SECTOR {
            turn.rewrite_header(&self.volume, |sector| header::patch_bytes(sector, at, bytes)).await?;
        }
        let first = (at / SECTOR).max(1) * SECTOR;
        if first >= end {
            return Ok(());
        }
        let mut sectors = vec![0; (end.next_multiple_of(SECTOR) - first) as usize];
        self.volume.read("reading the header", first, IoBufMut::new(&mut sectors)).await?;
        for (i, &byte) in (at..).zip(bytes).filter(|&(i, _)| i >= first) {
            if let Some(place) = sectors.get_mut((i - first) as usize) {
                *place = byte;
            }
        }
        if let Err(e) = self.volume.write("writing the header", first, IoBuf::new(&sectors)).await {
            // As for the first sector: nobody knows what the header says now, so nothing may be written that depends on it.
            self.volume.fail(|| e.to_string());
            return Err(e);
        }
        self.volume.flush().await
    }
}

/// The first cluster, with the turn for it.
pub(super) struct Found<'a> {
    turn: CommitTurn<'a>,
    header: Header,
    room: Room,
}

/// Where the extension is, or goes.
enum Room {
    Existing {
        at: u64,
        last: bool,
    },
    New {
        end: u64,
        /// Where the backing file's name must go first.
        name: Option<(u64, Vec<u8>)>,
    },
}
