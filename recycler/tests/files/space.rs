//! What a compaction and the recycler do to a real file: how much space it takes, and what is next to what.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::device::host::HostFile;
use qcow_recycler::image::create;
use qcow_recycler::recycler::{Control, compact, run};
use qcow_recycler::{BlockDevice, CreateOptions, ExtentKind, Image, Options};
use tempfile::TempDir;

const CLUSTER: u64 = 64 << 10;

const QUICK: Duration = Duration::from_millis(20);

/// For a recycler that gives the space of what is discarded back soon, and moves nothing.
fn punching() -> Options {
    Options { compact_after_unmaps: None, keep_erased: 0, settle_time: QUICK, flush_after: QUICK, ..Options::default() }
}

struct Made {
    dir: TempDir,
    image: Arc<Image<HostFile>>,
    cluster_size: u64,
    clusters: u64,
}

fn contents(cluster: u64, cluster_size: u64) -> Vec<u8> {
    (0..cluster_size).map(|i| (cluster * 7 + i / 512 + 1) as u8 | 1).collect()
}

/// An image whose clusters are all written, in order.
async fn full(clusters: u64, cluster_size: u64, options: Options) -> Made {
    let dir = tempfile::tempdir().unwrap();
    let device = HostFile::create(dir.path().join("disk")).unwrap();
    let shape = CreateOptions { cluster_size, ..CreateOptions::new(clusters * cluster_size) };
    create(&device, &shape).await.unwrap();
    let image = Arc::new(Image::open(device, options).await.unwrap());
    for c in 0..clusters {
        image.write(c * cluster_size, IoBuf::new(&contents(c, cluster_size))).await.unwrap();
    }
    image.flush().await.unwrap();
    Made { dir, image, cluster_size, clusters }
}

impl Made {
    /// Bytes of the host's space.
    fn space(&self) -> u64 {
        // A file system may account for it late.
        fs::File::open(self.dir.path().join("disk")).unwrap().sync_all().unwrap();
        fs::metadata(self.dir.path().join("disk")).unwrap().blocks() * 512
    }

    async fn host(&self, cluster: u64) -> Option<u64> {
        let size = self.cluster_size;
        match self.image.extent(cluster * size, size).await.unwrap().kind {
            ExtentKind::Data { host_offset } => Some(host_offset / size),
            _ => None,
        }
    }

    /// How often a guest cluster does not follow the one before it, where both are in the file.
    async fn breaks(&self) -> usize {
        let mut breaks = 0;
        let mut before = None;
        for c in 0..self.clusters {
            let here = self.host(c).await;
            breaks += usize::from(matches!((before, here), (Some(a), Some(b)) if a + 1 != b));
            before = here;
        }
        breaks
    }

    async fn verify(&self, kept: impl Fn(u64) -> bool) {
        let size = self.cluster_size;
        let mut buf = vec![0; size as usize];
        for c in 0..self.clusters {
            self.image.read(c * size, IoBufMut::new(&mut buf)).await.unwrap();
            let expected = if kept(c) { contents(c, size) } else { vec![0; size as usize] };
            assert!(buf == expected, "guest cluster {c}");
        }
    }
}

/// Whether a cluster is kept: runs of one to four, with gaps of one to four between them.
fn in_runs(cluster: u64) -> bool {
    let mut at = 0;
    for n in 0u64.. {
        let (length, gap) = (1 + (n * n * 31 + n * 7) / 3 % 4, 1 + (n * n * 17 + n * 5) / 2 % 4);
        if cluster < at + length {
            return true;
        }
        at += length + gap;
        if cluster < at {
            return false;
        }
    }
    unreachable!()
}

#[tokio::test(start_paused = true)]
async fn a_compaction_gives_space_back_as_it_goes_and_cuts_no_run() {
    // A second's work is a batch.
    let made = full(512, CLUSTER, Options { rate_limit: Some(16 * CLUSTER), ..Options::default() }).await;
    for c in (0..512).filter(|&c| !in_runs(c)) {
        made.image.discard(c * CLUSTER, CLUSTER).await.unwrap();
    }
    made.image.flush().await.unwrap();
    let before = made.breaks().await;
    let mut seen = Vec::new();
    let report = compact(&made.image, &mut |p| {
        seen.push((p.done, p.total, p.file_size));
        true
    })
    .await
    .unwrap();
    assert!(report.moved > 64 * CLUSTER, "{report:?}");
    // Half-way, most of what was moved has been cut off with the holes among it.
    let half = seen.iter().find(|(done, total, _)| done * 2 >= *total).unwrap();
    let to_go = report.file_size_before - report.file_size_after;
    assert!(half.2 + to_go / 4 < report.file_size_before, "{half:?} of {report:?}");
    // Between the clusters that moved and those that did not there is one seam, and there are a few between batches.
    let after = made.breaks().await;
    assert!(after <= before + 2 + 16, "{before} runs were cut before, {after} are now");
    made.verify(in_runs).await;
    made.image.close().await.unwrap();
}

/// With clusters this small, a refcount block counts 2048 of them, and the file has several: each lies in the midst of what it
/// counts.
#[tokio::test(start_paused = true)]
async fn refcount_blocks_do_not_keep_the_file_long_until_the_end() {
    const SMALL: u64 = 4 << 10;
    let (clusters, batch) = (10_000, 256 * SMALL);
    let made = full(clusters, SMALL, Options { rate_limit: Some(batch), ..Options::default() }).await;
    for c in (0..clusters).filter(|&c| !in_runs(c)) {
        made.image.discard(c * SMALL, SMALL).await.unwrap();
    }
    made.image.flush().await.unwrap();
    let mut seen = Vec::new();
    let report = compact(&made.image, &mut |p| {
        seen.push(p);
        true
    })
    .await
    .unwrap();
    assert!(report.moved > 2048 * SMALL, "{report:?}");
    // About every other cluster is free, so what a batch moves makes the file shorter by twice as much, two or three batches
    // later.
    let to_go = report.file_size_before - report.file_size_after;
    for p in seen {
        let gone = (to_go * p.done / p.total).saturating_sub(3 * 2 * batch);
        assert!(p.file_size <= report.file_size_before - gone, "{p:?} of {report:?}");
    }
    made.verify(in_runs).await;
    made.image.close().await.unwrap();
}

#[tokio::test]
async fn the_host_gets_the_space_of_discarded_clusters_back_without_a_compaction() {
    for punch_junk in [true, false] {
        let made = full(256, CLUSTER, Options { punch_junk, ..punching() }).await;
        if !made.image.device().features().punch_hole {
            return;
        }
        let control = Control::new();
        let recycler = tokio::spawn(run(made.image.clone(), control.clone()));
        let kept = |c: u64| !(64..192).contains(&c);
        made.image.discard(64 * CLUSTER, 128 * CLUSTER).await.unwrap();
        let (space, length) = (made.space(), made.image.stats().file_size);
        let mut now = space;
        for _ in 0..if punch_junk { 500 } else { 25 } {
            tokio::time::sleep(QUICK).await;
            now = made.space();
            if now + 120 * CLUSTER <= space {
                break;
            }
        }
        assert_eq!(now + 120 * CLUSTER <= space, punch_junk, "{space} bytes before, {now} now");
        assert_eq!(made.image.stats().file_size, length);
        made.verify(kept).await;
        // The clusters are as good as any.
        for c in 64..192 {
            made.image.write(c * CLUSTER, IoBuf::new(&contents(c, CLUSTER))).await.unwrap();
        }
        made.verify(|_| true).await;
        control.stop();
        recycler.await.unwrap();
        made.image.close().await.unwrap();
    }
}

/// An image whose discarded clusters occupy no space.
async fn punched() -> Option<Made> {
    let made = full(1536, CLUSTER, punching()).await;
    if !made.image.device().features().punch_hole {
        return None;
    }
    let control = Control::new();
    let recycler = tokio::spawn(run(made.image.clone(), control.clone()));
    let full = made.space();
    let gone = (0..1536).filter(|&c| !in_runs(c)).count() as u64;
    for c in (0..1536).filter(|&c| !in_runs(c)) {
        made.image.discard(c * CLUSTER, CLUSTER).await.unwrap();
    }
    for _ in 0..500 {
        tokio::time::sleep(QUICK).await;
        if made.space() + gone * CLUSTER * 9 / 10 <= full {
            break;
        }
    }
    control.stop();
    recycler.await.unwrap();
    let now = made.space();
    assert!(now + gone * CLUSTER / 2 < full, "{now} bytes of {full}: nothing was punched");
    Some(made)
}

/// Where holes occupy no space, filling them takes some before what was there is given back: a few MiB, however much moves.
#[tokio::test]
async fn filling_holes_takes_little_space() {
    let Some(made) = punched().await else { return };
    let (before, breaks) = (made.space(), made.breaks().await);
    let (mut peak, mut done) = (0, 0);
    let report = compact(&made.image, &mut |p| {
        peak = made.space().max(peak);
        assert!(p.done >= done, "{} clusters were done, and then {}", done, p.done);
        done = p.done;
        true
    })
    .await
    .unwrap();
    assert!(report.moved > 22 << 20, "{report:?}");
    // One seam, and a few between batches, however small the parts are that they are moved in.
    let after = made.breaks().await;
    assert!(after <= breaks + 2 + 16, "{breaks} runs were cut before, {after} are now");
    assert!(peak < before + (14 << 20), "{before} bytes before, {peak} at most meanwhile; {report:?}");
    made.verify(in_runs).await;
    made.image.close().await.unwrap();
}

/// Nor does it if a guest writes to the last cluster all the time, so that the file cannot be cut.
#[tokio::test]
async fn filling_holes_takes_little_space_though_the_end_of_the_file_is_in_use() {
    let Some(made) = punched().await else { return };
    let before = made.space();
    let last = (0..1536).rev().find(|&c| in_runs(c)).unwrap();
    let host = made.host(last).await.unwrap();
    let (mut peak, mut moved_below) = (0, 0);
    let report = compact(&made.image, &mut |p| {
        block_on(made.image.write(last * CLUSTER, IoBuf::new(&contents(last, CLUSTER)))).unwrap();
        peak = made.space().max(peak);
        if p.file_size > host * CLUSTER {
            moved_below = p.done;
        }
        true
    })
    .await
    .unwrap();
    assert!(moved_below * CLUSTER > 20 << 20, "the file was cut when {moved_below} clusters were done");
    assert!(peak < before + (14 << 20), "{before} bytes before, {peak} at most meanwhile; {report:?}");
    made.verify(in_runs).await;
    made.image.close().await.unwrap();
}

/// An image of which all but every eighth cluster is discarded, and its recycler.
async fn discarded(options: Options) -> (Made, Control, tokio::task::JoinHandle<()>) {
    let made = full(512, CLUSTER, options).await;
    let control = Control::new();
    let recycler = tokio::spawn(run(made.image.clone(), control.clone()));
    for c in (0..512).filter(|c| c % 8 != 0) {
        made.image.discard(c * CLUSTER, CLUSTER).await.unwrap();
    }
    (made, control, recycler)
}

/// With a limited rate the recycler has work for half a minute. Nobody waits so long for it.
#[tokio::test(start_paused = true)]
async fn who_stops_a_slow_recycler_waits_for_a_seconds_work_at_most() {
    for keep_erased in [0, 64 << 20] {
        let slow = Options { rate_limit: Some(1 << 20), keep_erased, ..punching() };
        let (made, control, recycler) = discarded(slow).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        let erased = made.image.stats().erased_bytes;
        assert!(keep_erased == 0 || (1 << 20..28 << 20).contains(&erased), "{erased} bytes");
        let began = tokio::time::Instant::now();
        made.image.check().await.unwrap();
        control.stop();
        recycler.await.unwrap();
        made.image.close().await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    }
}

/// A guest that takes a cluster now and then, or discards one, does not put the compaction off for ever.
#[tokio::test(start_paused = true)]
async fn a_guest_at_work_does_not_keep_the_file_long() {
    let second = Duration::from_secs(1);
    for discards in [false, true] {
        let options = Options {
            compact_after_unmaps: Some(1 << 20),
            keep_erased: 1 << 20,
            settle_time: 5 * second,
            flush_after: second,
            ..Options::default()
        };
        let (made, control, recycler) = discarded(options).await;
        let long = made.image.stats().file_size;
        for c in (0..512).filter(|c| c % 8 == if discards { 0 } else { 1 }).take(30) {
            tokio::time::sleep(4 * second).await;
            if discards {
                made.image.discard(c * CLUSTER, CLUSTER).await.unwrap();
            } else {
                made.image.write(c * CLUSTER, IoBuf::new(&contents(c, CLUSTER))).await.unwrap();
            }
        }
        let now = made.image.stats().file_size;
        assert!(now < long / 2, "{long} bytes before, {now} now");
        control.stop();
        recycler.await.unwrap();
        made.image.close().await.unwrap();
    }
}

/// A compaction ends although a guest frees more all the time.
#[tokio::test(start_paused = true)]
async fn a_compaction_leaves_what_is_discarded_meanwhile_to_the_next_one() {
    const SMALL: u64 = 4 << 10;
    let made = full(4096, SMALL, Options { rate_limit: Some(16 * SMALL), ..Options::default() }).await;
    for c in (0..4096).filter(|c| c % 2 == 0) {
        made.image.discard(c * SMALL, SMALL).await.unwrap();
    }
    made.image.flush().await.unwrap();
    let image = made.image.clone();
    let guest = tokio::spawn(async move {
        for n in 0..2000 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            image.discard((n * 37 % 2048 * 2 + 1) * SMALL, SMALL).await.unwrap();
        }
    });
    let report = compact(&made.image, &mut |_| true).await.unwrap();
    assert!(!guest.is_finished() && report.moved > 500 * SMALL, "{report:?}");
    guest.await.unwrap();
    made.image.close().await.unwrap();
}

/// Clusters that guests get at the file's end while a compaction looks at the tables do not make it give up.
#[tokio::test(start_paused = true)]
async fn a_compaction_moves_what_guests_get_while_it_looks_at_the_tables() {
    const SMALL: u64 = 4 << 10;
    let made = full(4096, SMALL, Options::default()).await;
    for c in (0..4096).filter(|c| c % 2 == 0) {
        made.image.discard(c * SMALL, SMALL).await.unwrap();
    }
    made.image.flush().await.unwrap();
    let image = made.image.clone();
    let guest = tokio::spawn(async move {
        for c in (0..4096).step_by(64) {
            image.write(c * SMALL, IoBuf::new(&contents(c, SMALL))).await.unwrap();
            tokio::task::yield_now().await;
        }
    });
    let report = compact(&made.image, &mut |_| true).await.unwrap();
    guest.await.unwrap();
    assert!(report.file_size_after < 10 << 20, "{report:?}");
    made.verify(|c| c % 2 == 1 || c % 64 == 0).await;
    made.image.close().await.unwrap();
}
