// Which clusters the tokens of a cluster see. One thread = one cluster; no shared memory, no atomics.
//
// For attention by clusters: the clusters that any token of a cluster sees, each once, in ascending order. A token sees
// those that reference.neighborhoods.nearest_clusters names. The thread sorts them in its own row of the result.

typedef long long whole;

extern "C" __global__ void unions(
    const whole *members,  // (B, k, m): token numbers of each cluster, -1 where it is short
    const whole *nearest,  // (B, n, R): cluster numbers, those that each token sees
    whole *seen,           // (B, k, m R): written; -1 after the last
    whole *count,          // (B, k): written; how many there are
    whole total,           // B k
    whole k, whole m, whole n, whole R) {
    const whole thread = (whole)blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= total) return;
    const whole image = thread / k;
    whole *row = seen + thread * m * R;
    whole found = 0;
    for (whole j = 0; j < m; j++) {
        const whole token = members[thread * m + j];
        for (whole r = 0; token >= 0 && r < R; r++) {
            const whole cluster = nearest[(image * n + token) * R + r];
            whole place = found;  // of the first one that is not smaller
            while (place > 0 && row[place - 1] >= cluster) place--;
            if (place < found && row[place] == cluster) continue;
            for (whole i = found; i > place; i--) row[i] = row[i - 1];
            row[place] = cluster;
            found++;
        }
    }
    for (whole i = found; i < m * R; i++) row[i] = -1;
    count[thread] = found;
}
