//! Compiles what is in C, and finds the library: in the directory that QCR_LIB_DIR names.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=QCR_LIB_DIR");
    println!("cargo:rerun-if-changed=shim.c");
    println!("cargo:rerun-if-changed=allocations.c");
    println!("cargo:rerun-if-changed=../../include/qcowrecycle.h");
    cc::Build::new().file("shim.c").include("../../include").std("c11").warnings_into_errors(true).compile("shim");

    let directory = PathBuf::from(env::var_os("QCR_LIB_DIR").expect("QCR_LIB_DIR: run this by `make bench`"));
    println!("cargo:rustc-link-search=native={}", directory.display());
    println!("cargo:rustc-link-lib=dylib=qcowrecycle");
    println!("cargo:rustc-link-arg-bins=-Wl,-rpath,{}", directory.display());

    // Preloaded into every contender to count allocations, so it lies beside the programs.
    let output = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let programs = output.ancestors().nth(3).expect("target/<profile>/build/<crate>/out");
    let compiled = Command::new(cc::Build::new().get_compiler().path())
        .args(["-O2", "-Wall", "-Werror", "-fPIC", "-shared", "-o"])
        .arg(programs.join("liballocations.so"))
        .args(["allocations.c", "-ldl"])
        .status();
    assert!(compiled.is_ok_and(|status| status.success()), "allocations.c does not compile");
}
