//! Opening an image.

use std::path::PathBuf;

use super::backing::{Backing, BackingFile};
use super::bitmaps::Bitmaps;
use super::compaction_turn::CompactionTurn;
use super::data_file::DataFile;
use super::encryption::Encryption;
use super::gate::Gate;
use super::obstacles::{Obstacle, Obstacles};
use super::snapshots::Snapshots;
use super::structure::Structure;
use super::turns::Turns;
use super::{Counters, Image};
use crate::buf::IoBufMut;
use crate::check::{Repair, check};
use crate::clusters::Clusters;
use crate::clusters::epochs::Epochs;
use crate::clusters::moves::ActiveMoves;
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::{Error, Result};
use crate::format::header::{self, AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA_FILE, Header, incompatible};
use crate::format::l2::Entry;
use crate::format::snapshot::{self, Snapshot};
use crate::metadata::Metadata;
use crate::metadata::slice::Entries as _;
use crate::options::{LogLevel, Options};
use crate::sync::atomic::{AtomicBool, AtomicU64};
use crate::sync::{AsyncMutex, Mutex, Notify};
use crate::units::GuestCluster;

/// What a program gives with an image, so that it is not looked for on the host.
pub(super) struct Given<D> {
    /// The device of its external data file.
    pub(super) data: Option<D>,
    pub(super) backing: Option<Backing>,
}

impl<D> Default for Given<D> {
    fn default() -> Self {
        Given { data: None, backing: None }
    }
}

impl<D: BlockDevice> Image<D> {
    /// Opens the image on `device`: reads the header, the L1 table and the refcount table. An image that was not closed
    /// cleanly is checked and repaired first, unless it is opened read-only (a version 2 image always, since it has no
    /// mark for that).
    ///
    /// # Errors
    /// [`Error::Invalid`] names the field and its offset; [`Error::Unsupported`] names the feature, and nothing was
    /// changed; [`Error::WrongPassphrase`], the same; [`Error::BackingNotAllowed`]; [`Error::DataFileNotAllowed`];
    /// [`Error::Io`]; [`Error::BadOption`] for a passphrase and no image that it could be for.
    pub async fn open(device: D, options: Options) -> Result<Self> {
        Self::open_above(device, Given::default(), options, &[]).await
    }

    /// Opens the image on `device` whose guest data is in an external data file, which is on `data`, whatever the image calls
    /// it. The option for data files is not asked.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`Error::BadOption`] if the image has no external data file.
    pub async fn open_with_data(device: D, data: D, options: Options) -> Result<Self> {
        Self::open_above(device, Given { data: Some(data), backing: None }, options, &[]).await
    }

    /// Opens the image on `device` whose backing file is `backing`, whatever the image calls it and says of its format. The option
    /// for backing files is not asked. An image behind another must have been opened read-only.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`Error::BadOption`] if the image has no backing file, or `backing` is open for writing;
    /// [`Error::Backing`].
    pub async fn open_with_backing<B: BlockDevice>(
        device: D,
        backing: BackingFile<B>,
        options: Options,
    ) -> Result<Self> {
        let volume = Volume::new(device).await?;
        let (header, _) = read_header(&volume).await?;
        let backing = Backing::given(&header, backing).await?;
        Self::open_volume(volume, Given { data: None, backing: Some(backing) }, options, &[]).await
    }

    /// Opens an image that is behind those at the given paths.
    pub(super) async fn open_above(device: D, given: Given<D>, options: Options, above: &[PathBuf]) -> Result<Self> {
        Self::open_volume(Volume::new(device).await?, given, options, above).await
    }

    async fn open_volume(volume: Volume<D>, given: Given<D>, mut options: Options, above: &[PathBuf]) -> Result<Self> {
        let (mut header, mut sector) = read_header(&volume).await?;
        let refusal =
            if options.read_only { header.unsupported_for_reading() } else { header.unsupported_for_writing() };
        if let Some(what) = refusal {
            return Err(Error::Unsupported { what });
        }
        let encryption = Encryption::open(&volume, &header, options.passphrase.as_ref()).await?;
        let backing = match given.backing {
            Some(backing) => backing,
            None => Backing::open(&header, &options, above).await?,
        };
        let used = encryption.is_on() || backing.uses_passphrase() || !above.is_empty();
        if options.passphrase.take().is_some() && !used {
            // Somebody may have exchanged the image for one that would store the guest's secrets as they are.
            let reason = "was given, and the image is not encrypted".to_owned();
            return Err(Error::BadOption { name: "passphrase".to_owned(), reason });
        }
        if options.check_on_connect {
            let report = check(volume.device(), Repair::No).await?;
            if report.errors() > 0 && (options.read_only || header.incompatible & incompatible::DIRTY == 0) {
                let reason = format!("a check found {} corruptions: {}", report.errors(), report.messages.join("; "));
                return Err(Error::invalid("image", 0, reason));
            }
        }
        let (snapshots, snapshots_end) = read_snapshots(&volume, &header).await?;
        let data = DataFile::open(&header, volume.device(), given.data, &options, above).await?;
        let mut cut_off = false;
        if !options.read_only && (header.version < 3 || header.incompatible & incompatible::DIRTY != 0) {
            cut_off = recover(&volume, &header, &options).await?;
            // A repair may have made tables anew at the end of the file.
            volume.refresh_length().await?;
            (header, sector) = read_header(&volume).await?;
        }
        let meta = Metadata::open(&volume, &header, sector, options.l2_cache_size).await?;
        // On a device of fixed length this is put right below.
        let end =
            if volume.can_resize() || options.read_only { header.geometry.clusters_for(volume.length()) } else { 0 };
        let obstacles = Obstacles::default();
        if options.read_only {
            obstacles.put(Obstacle::ReadOnly);
        }
        let image = Image {
            meta,
            clusters: Clusters::new(end),
            epochs: Epochs::default(),
            moves: ActiveMoves::default(),
            counters: Counters::default(),
            incompatible: header.incompatible & !incompatible::DIRTY,
            compression_type: header.compression_type,
            snapshots: Mutex::new(Snapshots::new(snapshots, header.snapshots_offset)),
            snapshot_tables_noted: AsyncMutex::default(),
            virtual_size: AtomicU64::new(header.virtual_size),
            plain_span: if encryption.is_on() { 0 } else { header.geometry.cluster_size() },
            encryption,
            header,
            backing,
            data,
            vacated: Mutex::default(),
            bitmaps: Bitmaps::default(),
            obstacles,
            panicked: AtomicBool::new(false),
            prepared: AtomicBool::new(false),
            gate: Gate::default(),
            allocating: Turns::default(),
            room: AsyncMutex::default(),
            table_turns: Turns::default(),
            structure: Structure::default(),
            disputed: Mutex::default(),
            compaction: CompactionTurn::default(),
            work: Notify::default(),
            volume,
            options,
        };
        if !image.options.read_only {
            image.note_tables(snapshots_end).await?;
            if image.header.snapshot_count > 0 {
                image.check_snapshot_table(snapshots_end).await?;
            }
            image.check_coverage().await?;
            image.note_end().await?;
            image.data.reach(image.header.virtual_size).await?;
            // The last that refuses an image: bitmaps that are marked as in use and not stored afterwards are lost. All of them are
            // read before any is marked, so an image that is refused is left as it was.
            image.load_bitmaps().await?;
            image.note_other_tables();
            let kept = image.header.autoclear & (AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_DATA_FILE);
            if image.header.autoclear != kept {
                // Features that we do not keep up to date must not be believed any more once we write.
                let turn = image.meta.exclusive_turn().await;
                turn.rewrite_header(&image.volume, |sector| header::patch_autoclear(sector, kept)).await?;
            }
            if cut_off {
                image.forget_leftovers().await?;
            }
        }
        Ok(image)
    }

    /// Forgets what is mapped past the end of the disk in an image that was cut off, perhaps while it was made smaller. Nobody
    /// else would give its space back, and QEMU would show it to the guest when the disk is made larger again. (VM state that is
    /// there goes, too. It is of use with its snapshot only, which has it in tables of its own.)
    ///
    /// The image is marked first, with a flush, and that makes the size durable that was read: whoever was killed may not have
    /// flushed it, and the larger disk must not come back without its contents. Cut before the commit is durable: what is past
    /// the end is mapped or not, and out of sight; the mark, or a leak in version 2, makes the next opening do this again. Cut
    /// after it: there are leaks, which the next opening reclaims.
    ///
    /// What cannot be forgotten, perhaps for want of room for a copy of a table that a snapshot shares, stays: that is no
    /// reason to refuse the image.
    async fn forget_leftovers(&self) -> Result<()> {
        let forgotten = async {
            if !self.is_mapped_past_end().await? {
                return Ok(());
            }
            self.prepare_changes().await?;
            let _frozen = self.freeze().await;
            self.forget_past(self.virtual_size()).await?;
            self.commit().await.map(drop)
        };
        if let Err(e) = forgotten.await {
            self.background_error("forgetting what is past the end of the disk", &e);
        }
        self.volume.ensure_sound()
    }

    /// Whether anything past the end of the disk is mapped. The one L2 table that is read for this also maps a part of the disk.
    async fn is_mapped_past_end(&self) -> Result<bool> {
        let (per_table, per_slice) = (self.meta.geometry.l2_entries(), self.meta.l2.per_slice());
        let mut at = self.meta.geometry.clusters_for(self.virtual_size());
        while !at.is_multiple_of(per_table) {
            let end = (at / per_slice + 1) * per_slice;
            if let Some((slice, index)) = self.meta.l2.slice(&self.volume, &self.meta.l1, GuestCluster(at)).await? {
                let entries = slice.read();
                if (index..).take((end - at) as usize).any(|i| entries.get(i) != Entry::default()) {
                    return Ok(true);
                }
            }
            at = end;
        }
        for l1_index in at / per_table..self.meta.l1.len() {
            if self.meta.l1.get(l1_index, &self.volume)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes note of where the image's own tables are; no two may be at one place, or writing one would destroy another.
    async fn note_tables(&self, snapshots_end: u64) -> Result<()> {
        let geometry = self.meta.geometry;
        let cluster_size = geometry.cluster_size();
        let refcounts = self.meta.refcounts.lock().await;
        let mut tables = self.meta.tables.lock();
        let snapshots = &self.snapshots.lock().entries;
        for range in self.header.host_ranges() {
            let end = range.offset.0.saturating_add(range.length);
            tables.insert_range(geometry.host_cluster(range.offset).0..geometry.clusters_for(end));
        }
        if !snapshots.is_empty() {
            let table = geometry.host_cluster(self.header.snapshots_offset).0..geometry.clusters_for(snapshots_end);
            let fixed = self.header.host_ranges().into_iter().find(|r| r.what == "snapshot table");
            let fixed = fixed.map_or(table.start, |r| geometry.clusters_for(r.offset.0 + r.length));
            if tables.meets(&(fixed.min(table.end)..table.end)) {
                let at = self.header.snapshots_offset.0;
                return Err(Error::invalid("snapshot table", at, "it reaches into another table"));
            }
            tables.insert_range(table);
        }
        for s in snapshots {
            let clusters = geometry.clusters_for(u64::from(s.l1_entries) * 8);
            let first = geometry.host_cluster(s.l1_offset).0;
            if tables.meets(&(first..first + clusters)) {
                let reason = format!("its L1 table at {} is at the place of another table", s.l1_offset);
                return Err(Error::invalid("snapshot table entry", s.at, reason));
            }
            tables.insert_range(first..first + clusters);
        }
        let file_end = self.volume.length().next_multiple_of(cluster_size);
        for index in 0..refcounts.table_len() {
            let Some(block) = refcounts.block(index)? else { continue };
            let at = refcounts.table_range().start * cluster_size + index * 8;
            let invalid = |reason: &str| Error::invalid("refcount table entry", at, format!("{block}: {reason}"));
            if block.0 >= file_end {
                return Err(invalid("the block lies outside the file"));
            }
            if !tables.insert(geometry.host_cluster(block)) {
                return Err(invalid("the block is at the place of another table"));
            }
        }
        for l1_index in 0..self.meta.l1.len() {
            // An entry that cannot be is reported to the request that needs it.
            if let Ok(Some(table)) = self.meta.l1.get(l1_index, &self.volume)
                && !tables.insert(geometry.host_cluster(table.host))
            {
                let reason = format!("{}: the L2 table is at the place of another table", table.host);
                return Err(Error::invalid("L1 table entry", self.meta.l1.offset_of(l1_index), reason));
            }
        }
        Ok(())
    }

    /// The snapshot table must be counted: its length is in itself, so damage may let it reach into what is free.
    async fn check_snapshot_table(&self, end: u64) -> Result<()> {
        let geometry = self.meta.geometry;
        let table = geometry.host_cluster(self.header.snapshots_offset).0..geometry.clusters_for(end);
        self.meta.refcounts.lock().await.load_range(&self.volume, &table).await
    }

    /// Takes note of where the image ends: with the file, but behind every counted cluster and not past what could be counted.
    /// A file may be shorter (a crash of QEMU leaves clusters that were counted and never written) or longer (somebody
    /// appended to it), and a device of fixed length is.
    async fn note_end(&self) -> Result<()> {
        let counted = self.meta.refcounts.lock().await.counted_end(&self.volume).await?;
        let coverage = self.meta.refcounts.lock().await.coverage();
        let mut states = self.clusters.lock();
        states.end = states.end.min(coverage).max(counted);
        Ok(())
    }

    /// What no refcount block counts is taken for free. If there is such a place below one that is counted, or at the end
    /// of the file, a block may have been lost: then a check must show that nothing is there.
    async fn check_coverage(&self) -> Result<()> {
        let refcounts = self.meta.refcounts.lock().await;
        let past = self.volume.can_resize() && refcounts.coverage() < self.clusters.lock().end;
        if !refcounts.has_holes() && !past {
            return Ok(());
        }
        let report = check(self.volume.device(), Repair::No).await?;
        if report.errors() > 0 {
            let at = refcounts.table_range().start * self.meta.geometry.cluster_size();
            let reason = format!(
                "blocks are missing, and clusters that they must count are in use: {}",
                report.messages.join("; ")
            );
            return Err(Error::invalid("refcount table", at, reason));
        }
        Ok(())
    }
}

/// Reads and validates the snapshot table; also returns where its last entry ends.
pub(super) async fn read_snapshots<D: BlockDevice>(
    volume: &Volume<D>,
    header: &Header,
) -> Result<(Vec<Snapshot>, u64)> {
    let mut snapshots = Vec::new();
    let mut at = header.snapshots_offset.0;
    let mut end = at;
    for _ in 0..header.snapshot_count {
        let mut bytes = vec![0; (volume.length().saturating_sub(at)).min(snapshot::FIXED as u64) as usize];
        volume.read("reading the snapshot table", at, IoBufMut::new(&mut bytes)).await?;
        let needed = snapshot::needed(&bytes, at)?.min(volume.length().saturating_sub(at) as usize);
        bytes.resize(needed, 0);
        volume.read("reading the snapshot table", at, IoBufMut::new(&mut bytes)).await?;
        let (entry, consumed) = snapshot::parse_entry(&bytes, at)?;
        let entry_end = at + needed as u64;
        entry.check_l1(header.geometry, volume.length())?;
        at += consumed as u64;
        if at - header.snapshots_offset.0 > snapshot::MAX_TABLE {
            return Err(Error::invalid("snapshot table", header.snapshots_offset.0, "it is too long"));
        }
        end = entry_end;
        snapshots.push(entry);
    }
    Ok((snapshots, end))
}

/// Reads and validates the header; also returns its first sector.
pub(super) async fn read_header<D: BlockDevice>(volume: &Volume<D>) -> Result<(Header, [u8; 512])> {
    let length = volume.length();
    let mut bytes = vec![0; length.min(4096) as usize];
    volume.read("reading the header", 0, IoBufMut::new(&mut bytes)).await?;
    // The extensions and the backing file's name may fill the first cluster.
    let cluster_bits = bytes.get(20..24).map_or(0, |b| b.iter().fold(0u32, |v, &b| v << 8 | u32::from(b)));
    if (13..=21).contains(&cluster_bits) {
        bytes.resize(length.min(1 << cluster_bits) as usize, 0);
        volume.read("reading the header", 0, IoBufMut::new(&mut bytes)).await?;
    }
    let header = Header::parse(&bytes, length)?;
    let mut sector = [0; 512];
    let there = bytes.len().min(512);
    sector[..there].copy_from_slice(&bytes[..there]);
    Ok((header, sector))
}

/// Repairs an image that was not closed cleanly. Returns whether it is one: in version 2 only leaks tell.
async fn recover<D: BlockDevice>(volume: &Volume<D>, header: &Header, options: &Options) -> Result<bool> {
    let dirty = header.incompatible & incompatible::DIRTY != 0;
    let mut report = check(volume.device(), if dirty { Repair::All } else { Repair::No }).await?;
    if !dirty && report.errors() == 0 && report.leaks > 0 {
        // Without the bit leaks are all that a crash of ours leaves; an image with errors is refused as it is.
        report = check(volume.device(), Repair::Leaks).await?;
    }
    let left = report.errors_left();
    if left > 0 {
        let why = if dirty { "it was not closed cleanly and" } else { "it" };
        let found = report.messages.join("; ");
        return Err(Error::invalid("image", 0, format!("{why} has {left} errors that were not repaired: {found}")));
    }
    let leaked = report.leaks - report.leaks_fixed;
    if leaked > 0 {
        let why = report.messages.join("; ");
        options.logger.log(LogLevel::Warning, || format!("{}: {leaked} clusters stay leaked: {why}", options.id));
    }
    if report.corruptions_fixed + report.leaks_fixed > 0 {
        options.logger.log(LogLevel::Info, || {
            format!(
                "{}: recovered: {} leaked clusters reclaimed, {} errors repaired",
                options.id, report.leaks_fixed, report.corruptions_fixed
            )
        });
    }
    Ok(dirty || report.leaks > 0)
}
