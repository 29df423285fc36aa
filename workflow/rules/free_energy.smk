rule free_energy:
    input:
        prepared="<run>/prepare/{system}/manifest.json",
    output:
        manifest="<run>/free_energy/{system}/manifest.json",
    log:
        "<run>/logs/free_energy/{system}.log",
    benchmark:
        "<run>/benchmarks/free_energy/{system}.tsv"
    conda:
        "../../envs/longstride.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        config=str(RUN.frozen),
        key=job_key("free_energy"),
        prepared=subpath(input.prepared, parent=True),
        out=subpath(output.manifest, parent=True),
        state=RUN.state("free_energy", "{system}"),
    message:
        "free-energy: umbrella sampling of {wildcards.system}"
    shell:
        "exec longstride free-energy --config {params.config:q} --system {wildcards.system}"
        " --prepared {params.prepared:q} --out {params.out:q} --state {params.state:q}"
        " --threads {threads} > {log:q} 2>&1"
