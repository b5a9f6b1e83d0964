//! Damaged images whose entries name the image's own tables as if they held the guest's data: nothing that moves data, or
//! stores it in another way, may take a table for data and give its place to somebody else.

use std::fs;
use std::path::PathBuf;

use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::device::host::HostFile;
use qcow_recycler::image::create;
use qcow_recycler::recycler::{compact, compress};
use qcow_recycler::{CreateOptions, Error, Image, Options};
use tempfile::TempDir;

const CLUSTER: u64 = 4096;
/// Guest clusters that are written. The entries of the last two name tables afterwards.
const WRITTEN: u64 = 40;
const DAMAGED: u64 = WRITTEN - 2;
/// Those that are written later have an L2 table of their own.
const LATER: u64 = CLUSTER / 8;
/// The L1 table has two clusters.
const SIZE: u64 = 3 << 29;
const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

struct Made {
    _dir: TempDir,
    path: PathBuf,
}

fn contents(cluster: u64) -> Vec<u8> {
    vec![cluster as u8 + 1; CLUSTER as usize]
}

/// A file's bytes, and what is where in them.
struct Anatomy(Vec<u8>);

impl Anatomy {
    fn word(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.0[at as usize..at as usize + 8].try_into().unwrap())
    }

    fn set(&mut self, at: u64, word: u64) {
        self.0[at as usize..at as usize + 8].copy_from_slice(&word.to_be_bytes());
    }

    fn cluster(&self, at: u64) -> &[u8] {
        &self.0[at as usize..(at + CLUSTER) as usize]
    }

    fn l1(&self) -> u64 {
        self.word(40)
    }

    fn refcount_table(&self) -> u64 {
        self.word(48)
    }

    fn snapshot_table(&self) -> u64 {
        self.word(64)
    }

    fn snapshot_l1(&self) -> u64 {
        self.word(self.snapshot_table())
    }

    /// Where the entry of a guest cluster is, in the L2 table that an L1 table leads to.
    fn entry(&self, l1: u64, guest: u64) -> u64 {
        (self.word(l1) & OFFSET) + guest * 8
    }

    /// Where the count of a cluster is.
    fn count_at(&self, at: u64) -> usize {
        (self.word(self.refcount_table()) & OFFSET) as usize + (at / CLUSTER * 2) as usize
    }

    fn count(&self, at: u64) -> u8 {
        self.0[self.count_at(at) + 1]
    }

    fn count_once(&mut self, at: u64) {
        let count = self.count_at(at);
        self.0[count..count + 2].copy_from_slice(&[0, 1]);
    }

    /// Counts every other one of free clusters that follow one another, so that there is no room for a table of two.
    fn narrow_holes(&mut self) {
        for at in (CLUSTER..self.0.len() as u64).step_by(CLUSTER as usize) {
            if self.count(at - CLUSTER) == 0 && self.count(at) == 0 {
                let at = self.count_at(at);
                self.0[at..at + 2].copy_from_slice(&[0, 1]);
            }
        }
    }

    /// Moves a table to the end of the file. The old place stays as it is, and counted, lest there be a hole that is large
    /// enough for the table.
    fn move_to_end(&mut self, table: u64, clusters: u64, name: u64) -> u64 {
        let end = (self.0.len() as u64).next_multiple_of(CLUSTER);
        self.0.resize((end + clusters * CLUSTER) as usize, 0);
        self.0.copy_within(table as usize..(table + clusters * CLUSTER) as usize, end as usize);
        self.set(name, end);
        for c in 0..clusters {
            self.count_once(end + c * CLUSTER);
        }
        end
    }
}

impl Made {
    /// An image with data that is worth compressing; with a snapshot that has other data, if that is wanted.
    async fn new(snapshot: bool) -> Made {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let device = HostFile::create(&path).unwrap();
        create(&device, &CreateOptions { cluster_size: CLUSTER, ..CreateOptions::new(SIZE) }).await.unwrap();
        let image = Image::open(device, Options::default()).await.unwrap();
        for c in 0..WRITTEN {
            image.write(c * CLUSTER, IoBuf::new(&contents(c + 100))).await.unwrap();
        }
        if snapshot {
            image.create_snapshot("one").await.unwrap();
        }
        for c in 0..WRITTEN {
            image.write(c * CLUSTER, IoBuf::new(&contents(c))).await.unwrap();
        }
        image.close().await.unwrap();
        Made { _dir: dir, path }
    }

    fn anatomy(&self) -> Anatomy {
        Anatomy(fs::read(&self.path).unwrap())
    }

    async fn open(&self) -> Image<HostFile> {
        let options = Options { runtime_asserts: true, ..Options::default() };
        Image::open(HostFile::open(&self.path, false).unwrap(), options).await.unwrap()
    }

    /// Whatever is free is used, what is not damaged is there, also when the image is opened again, and the cluster of the
    /// table is counted and holds what it held.
    async fn verify(&self, image: Image<HostFile>, kept: impl Fn(u64) -> bool, (table, before): (u64, &[u8])) {
        for _ in 0..2 {
            image.flush().await.unwrap();
        }
        assert!(self.anatomy().cluster(table) == before, "the table was overwritten");
        for c in 0..WRITTEN {
            image.write((LATER + c) * CLUSTER, IoBuf::new(&contents(c))).await.unwrap();
        }
        image.close().await.unwrap();
        drop(image);
        let after = self.anatomy();
        // What was written since is named by later entries.
        assert!(after.cluster(table)[..8] == before[..8], "the table was overwritten");
        assert_eq!(after.count(table), 1, "the table is not counted any more");
        let image = self.open().await;
        let mut buf = vec![0; CLUSTER as usize];
        for c in 0..WRITTEN {
            image.read((LATER + c) * CLUSTER, IoBufMut::new(&mut buf)).await.unwrap();
            assert!(buf == contents(c), "guest cluster {}", LATER + c);
            if c < DAMAGED {
                image.read(c * CLUSTER, IoBufMut::new(&mut buf)).await.unwrap();
                assert!(buf == if kept(c) { contents(c) } else { vec![0; CLUSTER as usize] }, "guest cluster {c}");
            }
        }
        image.close().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn compressing_leaves_tables_where_they_are() {
    type Place = fn(&Anatomy) -> u64;
    let tables: [(&str, Place); 4] = [
        ("L1 table", Anatomy::l1),
        ("refcount table", Anatomy::refcount_table),
        ("snapshot table", Anatomy::snapshot_table),
        ("snapshot's L1 table", Anatomy::snapshot_l1),
    ];
    for (what, table) in tables {
        let made = Made::new(true).await;
        let mut file = made.anatomy();
        let table = table(&file);
        let entry = file.entry(file.l1(), DAMAGED);
        file.set(entry, table | COPIED);
        fs::write(&made.path, &file.0).unwrap();
        let image = made.open().await;
        match compress(&image, &mut |_| true).await {
            Err(Error::Invalid { field: "L2 table entry", offset, .. }) => assert_eq!(offset, entry, "{what}"),
            other => panic!("the {what} was compressed: {other:?}"),
        }
        made.verify(image, |_| true, (table, file.cluster(table))).await;
    }
}

/// An L1 table of two clusters stands at the end of the file, and is in the way: the holes are too small for it.
async fn with_l1_at_the_end(snapshot: bool) -> (Made, Anatomy) {
    let made = Made::new(snapshot).await;
    let image = made.open().await;
    for c in (0..WRITTEN).step_by(2) {
        image.discard(c * CLUSTER, CLUSTER).await.unwrap();
    }
    image.close().await.unwrap();
    let mut file = made.anatomy();
    file.narrow_holes();
    file.move_to_end(file.l1(), 2, 40);
    (made, file)
}

#[tokio::test(start_paused = true)]
async fn a_compaction_leaves_tables_where_they_are() {
    for snapshot in [false, true] {
        let (made, mut file) = with_l1_at_the_end(snapshot).await;
        // Entries of the disk's, or of the snapshot's: if they named data, all of the file's end could move.
        let (l1, flag) = if snapshot { (file.snapshot_l1(), 0) } else { (file.l1(), COPIED) };
        let entry = file.entry(l1, DAMAGED);
        let table = file.l1();
        file.set(entry, table | flag);
        file.set(entry + 8, (table + CLUSTER) | flag);
        fs::write(&made.path, &file.0).unwrap();
        let image = made.open().await;
        compact(&image, &mut |_| true).await.unwrap();
        assert!(image.stats().background_errors > 0, "nobody was told");
        assert_eq!(made.anatomy().l1(), table, "the table was moved after all");
        assert_eq!(made.anatomy().word(entry), table | flag, "the entry was rewritten");
        made.verify(image, |c| c % 2 == 1, (table, file.cluster(table))).await;
    }
}

/// An L1 table of two clusters stands at the end of the file, which has holes for it.
async fn with_l1_to_move(snapshot: bool) -> (Made, Anatomy) {
    let made = Made::new(snapshot).await;
    let image = made.open().await;
    for c in (0..WRITTEN).filter(|c| c / 4 % 2 == 0) {
        image.discard(c * CLUSTER, CLUSTER).await.unwrap();
    }
    image.close().await.unwrap();
    let mut file = made.anatomy();
    file.move_to_end(file.l1(), 2, 40);
    (made, file)
}

/// A table that is moved leaves a place that is about to be free: though an entry names it, it is not freed once more.
#[tokio::test(start_paused = true)]
async fn where_a_table_was_nothing_is_freed_twice() {
    let (made, mut file) = with_l1_to_move(false).await;
    let table = file.l1();
    let entry = file.entry(table, DAMAGED);
    file.set(entry, table | COPIED);
    fs::write(&made.path, &file.0).unwrap();
    let image = made.open().await;
    compact(&image, &mut |_| true).await.unwrap();
    assert_ne!(made.anatomy().l1(), table, "the table was not moved");
    assert!(image.stats().background_errors > 0, "nobody was told");
    assert_eq!(made.anatomy().word(made.anatomy().entry(made.anatomy().l1(), DAMAGED)), table | COPIED);
    image.flush().await.unwrap();
    image.close().await.unwrap();
}

/// A snapshot's L1 entries name the disk's L1 table, as if its clusters were L2 tables.
#[tokio::test(start_paused = true)]
async fn what_a_snapshot_takes_for_its_l2_table_is_not_moved() {
    let (made, mut file) = with_l1_at_the_end(true).await;
    let (entry, table) = (file.snapshot_l1() + 8, file.l1());
    file.set(entry, table);
    file.set(entry + 8, table + CLUSTER);
    fs::write(&made.path, &file.0).unwrap();
    let image = made.open().await;
    compact(&image, &mut |_| true).await.unwrap();
    assert!(image.stats().background_errors > 0, "nobody was told");
    assert_eq!(made.anatomy().l1(), table, "the table was moved after all");
    assert_eq!(made.anatomy().word(entry), table, "the entry was rewritten");
    made.verify(image, |c| c % 2 == 1, (table, file.cluster(table))).await;
}

#[tokio::test(start_paused = true)]
async fn what_a_snapshot_takes_for_its_l2_table_is_not_freed_with_it() {
    type Place = fn(&Anatomy) -> u64;
    let tables: [(&str, Place); 3] = [
        ("refcount table", Anatomy::refcount_table),
        ("snapshot table", Anatomy::snapshot_table),
        // As an L2 table it maps nothing: nothing else is wrong with it.
        ("L1 table's second cluster", |file| file.l1() + CLUSTER),
    ];
    for (what, table) in tables {
        let made = Made::new(true).await;
        let mut file = made.anatomy();
        let table = table(&file);
        let entry = file.snapshot_l1() + 8;
        file.set(entry, table);
        fs::write(&made.path, &file.0).unwrap();
        let image = made.open().await;
        let deleted = image.delete_snapshot("one").await;
        assert!(matches!(deleted, Err(Error::Invalid { .. })), "{what}: {deleted:?}");
        made.verify(image, |_| true, (table, file.cluster(table))).await;
    }
}

/// Of what is refused, the error says where it is: every entry of the snapshot's L1 table names the same L2 table.
#[tokio::test(start_paused = true)]
async fn a_snapshots_l2_table_has_one_index() {
    let made = Made::new(true).await;
    let mut file = made.anatomy();
    let l1 = file.snapshot_l1();
    for index in 1..SIZE / CLUSTER / LATER {
        file.set(l1 + index * 8, file.word(l1));
    }
    fs::write(&made.path, &file.0).unwrap();
    let image = made.open().await;
    for call in ["delete", "apply"] {
        let refused =
            if call == "delete" { image.delete_snapshot("one").await } else { image.apply_snapshot("one").await };
        let at = match refused {
            Err(Error::Invalid { field: "L1 table entry", offset, .. }) => offset,
            other => panic!("{call}: {other:?}"),
        };
        assert_eq!(at, l1 + 8, "{call}");
    }
    compact(&image, &mut |_| true).await.unwrap();
    made.verify(image, |_| true, (file.refcount_table(), file.cluster(file.refcount_table()))).await;
}

/// The disk's L1 table moves, and a snapshot names the place where it was: nobody else gets that.
#[tokio::test(start_paused = true)]
async fn what_a_snapshot_takes_for_its_l2_table_stays_when_the_table_moves() {
    let (made, mut file) = with_l1_to_move(true).await;
    let table = file.l1();
    file.set(file.snapshot_l1() + 8, table);
    fs::write(&made.path, &file.0).unwrap();
    let image = made.open().await;
    compact(&image, &mut |_| true).await.unwrap();
    assert_ne!(made.anatomy().l1(), table, "the table was not moved");
    made.verify(image, |c| c / 4 % 2 == 1, (table, file.cluster(table))).await;
}

/// The disk claims the L2 table of a snapshot for itself alone. Another snapshot that is made, or not, takes nothing from the first.
#[tokio::test(start_paused = true)]
async fn a_new_snapshot_takes_no_table_from_an_old_one() {
    let made = Made::new(true).await;
    let mut file = made.anatomy();
    let table = file.word(file.snapshot_l1()) & OFFSET;
    file.set(file.l1(), table | COPIED);
    // So that the new snapshot gets a table of its own, without the flag.
    file.set(table, file.word(table) | COPIED);
    fs::write(&made.path, &file.0).unwrap();
    let image = made.open().await;
    let _ = image.create_snapshot("two").await;
    for _ in 0..2 {
        image.flush().await.unwrap();
    }
    for c in 0..WRITTEN {
        image.write((LATER + c) * CLUSTER, IoBuf::new(&contents(c))).await.unwrap();
    }
    image.close().await.unwrap();
    let after = made.anatomy();
    assert!(after.cluster(table) == file.cluster(table), "the table was overwritten");
    assert!(after.count(table) > 0, "the table is not counted any more");
}
