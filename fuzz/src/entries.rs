//! One L2 table of arbitrary entries in an image that is otherwise right: nothing but the entries misleads, so each of
//! them is reached.

use qcow_recycler::format::l2::{self, Mapping};
use qcow_recycler::format::refcount;

use super::anatomy::put;
use super::choices::Choices;
use super::known::Disk;
use super::meet;
use super::mutate::File;

/// Of the input: the shape, the L2 table as far as it goes, at most 64 entries; then what lies behind the tables.
pub fn meet(input: &[u8]) {
    let Some((&[bits, version, order, seed], rest)) = input.split_first_chunk() else { return };
    let bits = 9 + bits.wrapping_sub(9) % 8;
    let version = 2 + version % 2;
    let order = if version == 2 { 4 } else { order % 7 };
    let (table, data) = rest.split_at(rest.len().min(64 * 8));
    decode(table, version.into(), 1 << bits);
    counts(data, order.into());

    let file = build(bits.into(), version.into(), order.into(), table, data);
    if let Err(e) = meet::meet(&file, Disk::default(), &mut Choices::new(seed.into())) {
        panic!("{e}");
    }
}

/// Header, refcount table, refcount block, L1 table and L2 table, a cluster each; then the data.
fn build(bits: u64, version: u64, order: u64, table: &[u8], data: &[u8]) -> File {
    let cluster = 1u64 << bits;
    let clusters = 5 + (data.len() as u64).div_ceil(cluster).max(4);
    let mut bytes = vec![0; (clusters * cluster) as usize];
    // A disk as long as 64 entries reach.
    let fields = [(0, 4, 0x5146_49fb), (4, 4, version), (20, 4, bits), (24, 8, 64 * cluster), (36, 4, 1)];
    let tables = [(40, 8, 3 * cluster), (48, 8, cluster), (56, 4, 1)];
    fields.into_iter().chain(tables).for_each(|(at, width, value)| put(&mut bytes, at, width, value));
    if version == 3 {
        put(&mut bytes, 96, 4, order);
        put(&mut bytes, 100, 4, 104);
    }
    put(&mut bytes, cluster, 8, 2 * cluster);
    put(&mut bytes, 3 * cluster, 8, l2::COPIED | (4 * cluster));
    let l2_table = 4 * cluster as usize;
    bytes[l2_table..l2_table + table.len()].copy_from_slice(table);
    let behind = 5 * cluster as usize;
    bytes[behind..behind + data.len()].copy_from_slice(data);
    // Each cluster counts as used once.
    let block = 2 * cluster as usize;
    for index in 0..clusters.min((cluster * 8) >> order) {
        refcount::set(&mut bytes[block..block + cluster as usize], order as u32, index as usize, 1);
    }
    File::new(bytes)
}

/// What decodes is aligned and encodes to what it was.
fn decode(table: &[u8], version: u32, cluster_size: u64) {
    for entry in table.as_chunks().0.iter().map(|&b| u64::from_be_bytes(b)) {
        match Mapping::decode(entry, version, cluster_size) {
            Ok(Mapping::Data { host, copied }) => {
                assert!(host.0.is_multiple_of(cluster_size) && host.0 != 0, "{entry:#x}");
                assert_eq!(Mapping::encode_data(host), entry | l2::COPIED);
                assert_eq!(copied, entry & l2::COPIED != 0);
            }
            Ok(Mapping::Zero { preallocated }) => {
                assert!(version == 3 && entry & l2::ZERO != 0, "{entry:#x}");
                assert!(preallocated.is_none_or(|(host, _)| host.0.is_multiple_of(cluster_size)), "{entry:#x}");
            }
            Ok(Mapping::Compressed { descriptor }) => assert_eq!(descriptor | l2::COMPRESSED, entry & !l2::COPIED),
            Ok(Mapping::Unallocated) => assert_eq!(entry & !l2::COPIED, 0),
            Ok(Mapping::Parts { .. }) => panic!("{entry:#x} has no subclusters"),
            Err(reason) => assert!(!reason.is_empty()),
        }
        if let Ok(Some((host, _))) = l2::decode_l1(entry, cluster_size) {
            assert!(host.0.is_multiple_of(cluster_size) && host.0 < 1 << 56, "{entry:#x}");
        }
    }
}

/// Setting what was got changes nothing, and neighbours are left alone.
fn counts(block: &[u8], order: u32) {
    let mut copy = block.to_vec();
    let entries = (block.len() * 8) >> order;
    for index in (0..entries).take(64) {
        let value = refcount::get(block, order, index);
        refcount::set(&mut copy, order, index, value);
    }
    assert_eq!(copy, block);
    assert_eq!(refcount::get(block, order, usize::MAX >> 8), 0);
}
