//! How a compaction goes through the tables of a large image while others need it.

use std::sync::Arc;
use std::time::Duration;

use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::device::host::HostFile;
use qcow_recycler::image::create;
use qcow_recycler::recycler::compact;
use qcow_recycler::{CreateOptions, Error, Image, Options};
use tempfile::TempDir;
use tokio::time::Instant;

const CLUSTER: u64 = 4 << 10;
/// What one L2 table maps.
const PER_TABLE: u64 = CLUSTER / 8 * CLUSTER;
const TABLES: u64 = 2048;

/// An image with many L2 tables, and little in them.
async fn large() -> (TempDir, Arc<Image<HostFile>>) {
    let dir = tempfile::tempdir().unwrap();
    let device = HostFile::create(dir.path().join("disk")).unwrap();
    let shape = CreateOptions { cluster_size: CLUSTER, ..CreateOptions::new(TABLES * PER_TABLE) };
    create(&device, &shape).await.unwrap();
    let image = Image::open(device, Options::default()).await.unwrap();
    for table in 0..TABLES {
        image.write(table * PER_TABLE, IoBuf::new(&[1; CLUSTER as usize])).await.unwrap();
    }
    image.discard(0, CLUSTER).await.unwrap();
    image.flush().await.unwrap();
    (dir, Arc::new(image))
}

/// Reads now and then.
fn guest(image: Arc<Image<HostFile>>) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let mut buf = [0; CLUSTER as usize];
        while image.read(PER_TABLE, IoBufMut::new(&mut buf)).await.is_ok() {
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
    })
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Beside {
    Nobody,
    Guest,
    GuestAndCheck,
}

/// Time stands still but for what is slept.
#[tokio::test(start_paused = true)]
async fn a_search_rests_while_guests_are_at_work_unless_somebody_waits_for_its_end() {
    for beside in [Beside::Nobody, Beside::Guest, Beside::GuestAndCheck] {
        let (_dir, image) = large().await;
        let guest = (beside != Beside::Nobody).then(|| guest(image.clone()));
        let mut check = None;
        let began = Instant::now();
        let mut moves_begin = None;
        compact(&image, &mut |p| {
            if beside == Beside::GuestAndCheck && check.is_none() {
                let image = image.clone();
                check = Some(tokio::spawn(async move {
                    image.check().await.unwrap();
                    began.elapsed()
                }));
            }
            if p.done > 0 || p.total > 1 {
                moves_begin.get_or_insert(began.elapsed());
            }
            true
        })
        .await
        .unwrap();
        // A rest after each 256 KiB of tables, unless the guest has been resting meanwhile.
        let searched = moves_begin.unwrap();
        let least = Duration::from_millis(TABLES * CLUSTER / (512 << 10));
        match beside {
            Beside::Nobody => assert_eq!(searched, Duration::ZERO),
            Beside::Guest => assert!(searched >= least, "{searched:?}"),
            Beside::GuestAndCheck => {
                let waited = check.unwrap().await.unwrap();
                assert!(waited < least / 2, "the check waited {waited:?}");
            }
        }
        image.close().await.unwrap();
        if let Some(guest) = guest {
            guest.await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_search_ends_when_it_is_cancelled_or_the_image_closed() {
    for closes in [false, true] {
        let (_dir, image) = large().await;
        let mut asked = 0;
        let mut closing = None;
        let ended = compact(&image, &mut |_| {
            asked += 1;
            if closes && closing.is_none() {
                let image = image.clone();
                closing = Some(tokio::spawn(async move { image.close().await }));
            }
            closes || asked < 10
        })
        .await;
        if closes {
            assert!(matches!(ended, Err(Error::Closed)), "{ended:?}");
            assert!(asked < TABLES / 8, "it was asked {asked} times before it ended");
            closing.unwrap().await.unwrap().unwrap();
        } else {
            assert!(matches!(ended, Err(Error::Cancelled)), "{ended:?}");
            assert_eq!(asked, 10);
            image.close().await.unwrap();
        }
    }
}

/// After what was to move has moved, tables are searched once more.
#[tokio::test(start_paused = true)]
async fn what_was_moved_is_cut_off_though_the_next_search_is_cancelled() {
    let (_dir, image) = large().await;
    for table in (0..TABLES).step_by(2) {
        image.discard(table * PER_TABLE, CLUSTER).await.unwrap();
    }
    let (mut planned, mut then) = (0, 0);
    let ended = compact(&image, &mut |p| {
        let searches = p.total == p.done + 1;
        let again = searches && planned > 0 && p.done == planned;
        if !searches {
            planned = p.total;
        }
        then = p.file_size;
        !again
    })
    .await;
    assert!(matches!(ended, Err(Error::Cancelled)), "{ended:?}");
    let after = image.stats().file_size;
    assert!(after + TABLES / 16 * CLUSTER < then, "{then} bytes when it was cancelled, {after} after");
    image.close().await.unwrap();
}
